"""How many bytes an adapter has, and how many its slots take."""

from __future__ import annotations

from elora_sglang.runtime.pool.layout import AdapterLayout


def payload_bytes(layout: AdapterLayout) -> int:
    """Bytes of weights over all layers, without alignment and unused tails."""
    return layout.itemsize * sum(p.rows * p.cols for layer in layout.layers for p in layer.pieces)


def pool_bytes(layout: AdapterLayout) -> int:
    """Bytes of the pool that the adapter's slots take over all layers."""
    return layout.slots * sum(layout.row_bytes) * len(layout.layers)
