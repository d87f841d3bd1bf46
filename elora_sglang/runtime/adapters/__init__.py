"""Adapters as files and tensors: read, checked, named. No server state."""
