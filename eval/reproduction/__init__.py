"""The paper's experiments in simulated time: scenes, claims, and the tables that show both."""
