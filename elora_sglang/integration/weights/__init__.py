"""Adapters' weights in SGLang: the LoRA memory pool, the backend, shards, the host side."""
