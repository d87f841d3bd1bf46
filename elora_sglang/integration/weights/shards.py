"""This tp rank's part of an adapter: shapes for the layout and matrices for the pool.

SGLang's own LoRA layers do the cutting (``slice_lora_a_weights``, ``slice_lora_b_weights``), so that
sharding, replicated KV heads and fused modules are right by construction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.lora.utils import get_target_module_name

from elora_sglang.integration.weights.peft import stacked_ranks
from elora_sglang.runtime.adapters.files import AdapterError
from elora_sglang.runtime.pool.layout import ModuleShape, SliceShape
from elora_sglang.runtime.pool.packing import LayerMatrices

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sglang.srt.lora.layers import BaseLayerWithLoRA
    from sglang.srt.lora.lora import LoRAAdapter


def modules_by_name(
    modules: Mapping[str, BaseLayerWithLoRA], targets: set[str]
) -> dict[str, BaseLayerWithLoRA]:
    """LoRA-wrapped layers of one decoder layer by normalised module name (``qkv_proj``).

    Raises:
        ValueError: two modules of the layer have one name.
    """
    found: dict[str, BaseLayerWithLoRA] = {}
    for name, module in modules.items():
        target = get_target_module_name(name, targets)
        if target in found:
            raise ValueError(
                f"elora: {name} is the second {target} of its layer; LoRA cannot tell them apart"
            )
        found[target] = module
    return found


def shapes(
    adapter: LoRAAdapter, layer: int, wrapped: Mapping[str, BaseLayerWithLoRA]
) -> tuple[ModuleShape, ...]:
    """LoRA shapes of one layer on this tp rank, in module-name order.

    Reads shapes only. They are the same on every tp rank, because SGLang cuts every module evenly.

    Raises:
        AdapterError: the adapter has a module that the server did not wrap.
    """
    found: list[ModuleShape] = []
    for (at, name), stacked in sorted(stacked_ranks(adapter).items()):
        if at != layer:
            continue
        module = wrapped.get(name)
        if module is None:
            raise AdapterError(
                adapter.config.path or f"adapter {adapter.uid}",
                f"adapts {name!r} in layer {layer}, where the server wraps {', '.join(sorted(wrapped))}",
                "Start the server with it in --lora-target-modules, or without the flag.",
            )
        edges = tuple(int(edge) for edge in module.lora_offsets)
        if len(stacked.ranks) == 1:
            edges = (0, edges[-1])
        slices = tuple(
            SliceShape(first, last - first, rank)
            for first, last, rank in zip(edges[:-1], edges[1:], stacked.ranks, strict=True)
            if rank
        )
        found.append(ModuleShape(name, int(module.lora_a.shape[-1]), slices))
    return tuple(found)


def matrices(
    adapter: LoRAAdapter, layer: int, wrapped: Mapping[str, BaseLayerWithLoRA], targets: set[str]
) -> LayerMatrices:
    """This tp rank's matrices of one layer, stored as :class:`ModuleShape` says; views where possible."""
    stacked: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in adapter.layers[layer].weights.items():
        target = get_target_module_name(name, targets)
        stacked.setdefault(target, {})["A" if "lora_A" in name else "B"] = tensor
    found: dict[tuple[str, int], torch.Tensor] = {}
    for shape in shapes(adapter, layer, wrapped):
        module = wrapped[shape.name]
        a = module.slice_lora_a_weights(stacked[shape.name]["A"])
        b = module.slice_lora_b_weights(stacked[shape.name]["B"])
        # Stock fills missing parts with zeros and repeats an A that is shared; neither is stored.
        found[shape.name, 0] = a[: shape.rank_rows]
        for index, part in enumerate(shape.slices, start=1):
            found[shape.name, index] = b[part.offset : part.offset + part.width, : part.rank].t()
    return found
