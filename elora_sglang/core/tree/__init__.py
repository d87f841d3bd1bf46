"""The dependency tree: root → adapter → KV, on two tiers of slots."""
