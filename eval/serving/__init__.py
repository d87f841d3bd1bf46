"""Live comparison of serving systems under memory pressure: workload, systems, runs, statistics.

Many files, because each step from a workload to a table can be used, and is tested, without the others.
"""
