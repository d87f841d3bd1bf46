"""PEFT adapters as SGLang stacks them: what stock gets wrong is put right here.

Stock SGLang 0.5.23 (``lora/lora.py``) scales every adapter by ``lora_alpha / r``, ignoring
``use_rslora``, ``rank_pattern`` and ``alpha_pattern``, and ends in a bare ``KeyError`` (or, later, in the
middle of a batch) on adapters that have only some of q/k/v, or up without gate.
:func:`normalize_weights` runs around ``LoRAAdapter._normalize_weights``, which both ways of loading
(files and tensors) go through: it corrects the scaling, completes partial groups so that stock can stack
them, and records which parts were really there, so that the others take no room in the pool.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.utils import get_layer_id
from sglang.srt.lora.layers import unwrap_lora_layer

from elora_sglang.runtime.adapters.files import AdapterError

if TYPE_CHECKING:
    from sglang.srt.layers.linear import LinearBase, QKVParallelLinear
    from sglang.srt.lora.lora import LoRAAdapter

#: Modules that SGLang serves as one, with their parts in stacking order.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

_PART_OF = {part: fused for fused, parts in FUSED.items() for part in parts}

_RECORD = "_elora_lora_ranks"


@dataclass(frozen=True)
class StackedRanks:
    """How one module of one layer was stacked.

    ``ranks``: LoRA rank of each part, 0 for one the adapter lacks; a single number for a module that has
    no parts, or whose parts share one A (the adapter was trained on the fused module).
    """

    ranks: tuple[int, ...]


@dataclass
class _Pair:
    """A ``[LoRA rank, in]`` and B ``[out, LoRA rank]`` of one module, with their tensor names."""

    a_name: str
    b_name: str
    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


def stacked_ranks(adapter: LoRAAdapter) -> dict[tuple[int, str], StackedRanks]:
    """How the adapter's modules were stacked, by (layer, module name).

    Raises:
        RuntimeError: the hook of this module did not run for the adapter.
    """
    record = getattr(adapter, _RECORD, None)
    if record is None:
        raise RuntimeError(
            f"elora: adapter {adapter.uid} was read without the hook around LoRAAdapter._normalize_weights"
        )
    return dict(record)


def normalize_weights(original: Callable[[LoRAAdapter], None], adapter: LoRAAdapter) -> None:
    """AROUND ``LoRAAdapter._normalize_weights``. Mutates the adapter's weights and its scaling.

    Raises:
        AdapterError: a tensor that is no half of a LoRA pair, or is for a module that is not there.
    """
    options = adapter.config.hf_config
    adapter.scaling = lora_scaling(options, options["lora_alpha"], options["r"])
    widths = _part_widths(adapter.base_model)
    record: dict[tuple[int, str], StackedRanks] = {}
    for layer, holder in enumerate(adapter.layers):
        pairs = _pairs(adapter, holder.weights)
        for stem, pair in pairs.items():
            _fold_own_scaling(adapter, stem, pair)
        _complete(adapter, layer, pairs, widths, record)
        holder.weights.clear()
        for pair in pairs.values():
            holder.weights[pair.a_name] = pair.a
            holder.weights[pair.b_name] = pair.b
    setattr(adapter, _RECORD, record)
    original(adapter)


def lora_scaling(options: dict[str, Any], alpha: float, rank: int) -> float:
    """``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora`` (rank-stabilised LoRA, arXiv 2312.03732)."""
    return float(alpha) / (math.sqrt(rank) if options.get("use_rslora") else rank)


def _pairs(adapter: LoRAAdapter, weights: dict[str, torch.Tensor]) -> dict[str, _Pair]:
    """A and B of each module by its stem, the tensor name up to ``.lora_A``."""
    halves: dict[str, dict[str, str]] = {}
    for name in weights:
        found = re.fullmatch(r"(.+)\.lora_([AB])(?:\.\w+)*\.weight", name)
        if found is None:
            raise _fault(adapter, f"tensor {name!r} is neither a LoRA A nor a LoRA B matrix")
        halves.setdefault(found[1], {})[found[2]] = name
    pairs: dict[str, _Pair] = {}
    for stem, names in halves.items():
        if len(names) != 2:
            raise _fault(adapter, f"{next(iter(names.values()))!r} has no other half of its LoRA pair")
        a, b = weights[names["A"]], weights[names["B"]]
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise _fault(
                adapter, f"{names['A']!r} {list(a.shape)} and its B {list(b.shape)} do not have one LoRA rank"
            )
        pairs[stem] = _Pair(names["A"], names["B"], a, b)
    return pairs


def _fault(adapter: LoRAAdapter, fault: str) -> AdapterError:
    return AdapterError(adapter.config.path or f"adapter {adapter.uid}", fault, "Save the adapter again.")


def _fold_own_scaling(adapter: LoRAAdapter, stem: str, pair: _Pair) -> None:
    """Fold into B what a module's own LoRA rank or alpha makes of the adapter's one scaling.

    ``alpha_pattern``: the first key that matches the end of the module's name counts (PEFT,
    ``utils/other.py`` ``get_pattern_key``).
    """
    options = adapter.config.hf_config
    alpha = options["lora_alpha"]
    path = stem.removeprefix("base_model.model.")
    for key, value in (options.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            alpha = value
            break
    own = lora_scaling(options, alpha, pair.rank)
    if own != adapter.scaling:
        if not adapter.scaling:
            raise _fault(adapter, "lora_alpha is 0 with another alpha in alpha_pattern")
        pair.b = pair.b.to(torch.float32) * (own / adapter.scaling)


def _part_widths(model: torch.nn.Module | None) -> dict[tuple[int, str], tuple[int, ...]]:
    """Unsharded output features of the base model's linear layers, one number per part, by (layer, name)."""
    found: dict[tuple[int, str], tuple[int, ...]] = {}
    for name, module in model.named_modules() if model is not None else ():
        layer = get_layer_id(name)
        linear: LinearBase | QKVParallelLinear = unwrap_lora_layer(module)
        if layer is None or not hasattr(linear, "output_size"):
            continue
        leaf = name.removesuffix(".base_layer").rpartition(".")[2]
        if hasattr(linear, "total_num_kv_heads"):
            heads, kv_heads, size = linear.total_num_heads, linear.total_num_kv_heads, linear.head_size
            found[layer, leaf] = (heads * size, kv_heads * size, kv_heads * size)
        else:
            found[layer, leaf] = tuple(getattr(linear, "output_sizes", (linear.output_size,)))
    return found


def _complete(
    adapter: LoRAAdapter,
    layer: int,
    pairs: dict[str, _Pair],
    widths: dict[tuple[int, str], tuple[int, ...]],
    record: dict[tuple[int, str], StackedRanks],
) -> None:
    """Record all modules' LoRA ranks, fill up q/k/v and gate/up groups. Mutates ``pairs``, ``record``."""
    for stem in list(pairs):
        prefix, leaf = stem[: stem.rfind(".") + 1], stem[stem.rfind(".") + 1 :]
        module = _PART_OF.get(leaf, leaf)
        if (layer, module) not in widths:
            raise _fault(adapter, f"{pairs[stem].a_name!r} is for a module that the base model does not have")
        if leaf == module:
            record[layer, module] = StackedRanks((pairs[stem].rank,))
        elif (layer, module) not in record:
            stems = [prefix + part for part in FUSED[module]]
            ranks = tuple(pairs[name].rank if name in pairs else 0 for name in stems)
            record[layer, module] = StackedRanks(ranks)
            _fill(pairs, pairs[stem], stem, list(zip(stems, widths[layer, module], strict=True)), max(ranks))


def _fill(
    pairs: dict[str, _Pair], known: _Pair, known_stem: str, group: list[tuple[str, int]], rank: int
) -> None:
    """Give each part an A, without rows if the adapter has none, and a B of ``rank`` columns, so that
    stock's concatenation along dimension 0 is well formed."""
    for stem, width in group:
        if stem not in pairs:
            pairs[stem] = _Pair(
                known.a_name.replace(known_stem, stem, 1),
                known.b_name.replace(known_stem, stem, 1),
                known.a.new_zeros((0, known.a.shape[1])),
                known.b.new_zeros((width, 0)),
            )
        pair = pairs[stem]
        if pair.b.shape[1] < rank:
            pair.b = torch.cat((pair.b, pair.b.new_zeros((pair.b.shape[0], rank - pair.b.shape[1]))), dim=1)
