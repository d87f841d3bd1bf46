"""Bytes: views of the unified pool, the adapter byte layout and slot lists. Torch, but no sglang."""
