"""ELORA on SGLang: one prefix tree, one pool and one cost model for LoRA adapters and KV caches.

Importing this package is cheap on purpose: it pulls in neither torch nor sglang, so that client
processes, linters and the simulator can use what they need and nothing more.
"""

__version__ = "0.1.0"
