"""Errors of the core."""

from __future__ import annotations


class InvariantError(RuntimeError):
    """The tree was asked for, or is in, a state that must not exist. The call that raised changed nothing."""
