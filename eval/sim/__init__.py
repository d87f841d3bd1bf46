"""A serving system in simulated time: the core objects of the server over a model of machine and scheduler."""
