"""Measurements on a CUDA machine; ``--dry-run`` proves on a CPU that each of them runs, and measures nothing."""
