"""A serving system in simulated time: the core objects of the server over a model of machine and scheduler.

Many files, because every simulated system, bound and table is one: a reader checks a system against its paper alone.
"""
