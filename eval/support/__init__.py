"""Stand-ins that tests and measurements share, for what takes a model or a GPU to have."""
