"""Decisions: the dependency tree, the policies and their invariants. Standard library only."""
