"""Audits of both tiers that do not trust the tree."""
