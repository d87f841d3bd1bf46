"""Copies between the tiers: the engine, how copies run, what they cost, who waits for whom."""
