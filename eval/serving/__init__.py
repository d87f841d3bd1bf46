"""Live comparison of serving systems under memory pressure: workload, systems, runs, statistics."""
