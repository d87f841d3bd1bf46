"""Hooks and classes of the scheduler process."""
