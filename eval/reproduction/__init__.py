"""The paper's experiments in simulated time: scenes, claims, and the run that fills the table beside them."""
