"""PEFT adapters as they are read by SGLang: what stock gets wrong is put right here.

Stock SGLang 0.5.23 (``lora/lora.py``) computes ``lora_alpha / r`` for every adapter, ignoring
``use_rslora``, ``rank_pattern`` and ``alpha_pattern``; fails with a bare ``KeyError`` on adapters that
have only some of q/k/v; and takes whatever tensor is no A for a B. :func:`normalize_weights` runs
around ``LoRAAdapter._normalize_weights``, which both ways of loading (files, tensors) go through. It
checks every tensor against the base model, so that a fault ends as HTTP 4xx naming file and tensor,
completes partial q/k/v and gate/up groups for stock's stacking, and records which parts were really
there, so that the others take no room in the pool.
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

if TYPE_CHECKING:
    from sglang.srt.lora.lora import LoRAAdapter

#: Attribute on a LoRAAdapter: {(layer, fused module name): LoRA rank per slice, 0 = not in the adapter}.
#: One entry for a module that is not fused, or whose fused form shares one A (see SHARED_A).
RANKS = "_elora_ranks"

#: Attribute on a LoRAAdapter: {(layer, module name)} of fused modules stored with one A for all slices.
SHARED_A = "_elora_shared_a"

#: Modules that SGLang serves as one, in its stacking order.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

_PART_OF = {part: fused for fused, parts in FUSED.items() for part in parts}

#: PEFT options that change the arithmetic in a way SGLang's LoRA layers do not know.
_REFUSED_OPTIONS = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
)


class AdapterError(ValueError):
    """An adapter that cannot be served; the text names its file and the fault."""


@dataclass
class _Pair:
    """A ``[rank, in]`` and B ``[out, rank]`` of one module, with the names they came under."""

    a_name: str = ""
    b_name: str = ""
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None


def normalize_weights(original: Callable[[LoRAAdapter], None], adapter: LoRAAdapter) -> None:
    """AROUND ``LoRAAdapter._normalize_weights``. Mutates the adapter's weights and scaling.

    Raises:
        AdapterError: the adapter is broken or uses an option that SGLang's layers cannot apply.
    """
    where = adapter.config.path or f"adapter {adapter.uid}"
    options = adapter.config.hf_config
    _check_options(where, options)
    extra = [*adapter.embedding_layers, *adapter.added_tokens_embeddings]
    if extra:
        raise AdapterError(
            f"{where}: tensor '{extra[0]}' adapts the embedding or lm_head, which --elora does not support; "
            "train the adapter on linear layers only"
        )
    adapter.scaling = _scaling(options, options["lora_alpha"], options["r"]) or 1.0
    base_layers = _base_layers(adapter.base_model)
    ranks: dict[tuple[int, str], tuple[int, ...]] = {}
    shared: set[tuple[int, str]] = set()
    for layer, holder in enumerate(adapter.layers):
        pairs = _pairs(where, holder.weights)
        for stem, pair in pairs.items():
            _check_pair(where, pair)
            _apply_patterns(where, adapter, stem, pair)
        _complete_groups(where, layer, pairs, base_layers, ranks, shared)
        holder.weights.clear()
        for pair in pairs.values():
            holder.weights[pair.a_name] = pair.a
            holder.weights[pair.b_name] = pair.b
    if not ranks:
        raise AdapterError(f"{where}: no LoRA tensor for any layer of the base model")
    setattr(adapter, RANKS, ranks)
    setattr(adapter, SHARED_A, shared)
    original(adapter)


def _check_options(where: str, options: dict[str, Any]) -> None:
    for name in _REFUSED_OPTIONS:
        if options.get(name):
            raise AdapterError(f"{where}/adapter_config.json: '{name}' is not supported by SGLang's LoRA layers")
    if options.get("bias", "none") not in (None, "none"):
        raise AdapterError(f"{where}/adapter_config.json: bias='{options['bias']}' is not supported, only 'none'")
    rank = options["r"]
    if not isinstance(rank, int) or rank < 1:
        raise AdapterError(f"{where}/adapter_config.json: LoRA rank r={rank!r} is not a positive number")


def _scaling(options: dict[str, Any], alpha: float, rank: int) -> float:
    """``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA (arXiv 2312.03732; PEFT ``use_rslora``)."""
    return float(alpha) / (math.sqrt(rank) if options.get("use_rslora") else rank)


def _pairs(where: str, weights: dict[str, torch.Tensor]) -> dict[str, _Pair]:
    """A and B of each module, by module stem (the tensor name up to ``.lora_A``)."""
    pairs: dict[str, _Pair] = {}
    for name, tensor in weights.items():
        stem, kind, _ = name.replace(".lora_B", ".lora_A").rpartition(".lora_A")
        if not kind or name.endswith(".bias"):
            raise AdapterError(f"{where}: tensor '{name}' is neither a LoRA A nor a LoRA B matrix")
        pair = pairs.setdefault(stem, _Pair())
        if ".lora_A" in name:
            pair.a_name, pair.a = name, tensor
        else:
            pair.b_name, pair.b = name, tensor
    return pairs


def _check_pair(where: str, pair: _Pair) -> None:
    if pair.a is None or pair.b is None:
        raise AdapterError(f"{where}: tensor '{pair.a_name or pair.b_name}' has no LoRA {'B' if pair.a_name else 'A'}")
    for name, tensor in ((pair.a_name, pair.a), (pair.b_name, pair.b)):
        if tensor.dim() != 2 or not tensor.numel():
            raise AdapterError(f"{where}: tensor '{name}' has shape {tuple(tensor.shape)}, expected a matrix")
        if not tensor.is_floating_point():
            raise AdapterError(f"{where}: tensor '{name}' has type {tensor.dtype}, expected floating point")
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{where}: tensor '{name}' contains NaN or infinite values")
    if pair.a.shape[0] != pair.b.shape[1]:
        raise AdapterError(
            f"{where}: '{pair.a_name}' has LoRA rank {pair.a.shape[0]}, '{pair.b_name}' has {pair.b.shape[1]}"
        )


def _pattern(patterns: dict[str, Any] | None, stem: str, default: Any) -> Any:
    """Value for a module by PEFT's rule: the first key that matches the end of the module's name."""
    path = stem.removeprefix("base_model.model.")
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def _apply_patterns(where: str, adapter: LoRAAdapter, stem: str, pair: _Pair) -> None:
    """Check the module's LoRA rank and fold its own scaling, if it has one, into B."""
    assert pair.a is not None and pair.b is not None
    options = adapter.config.hf_config
    rank = _pattern(options.get("rank_pattern"), stem, options["r"])
    if pair.a.shape[0] != rank:
        raise AdapterError(
            f"{where}: tensor '{pair.a_name}' has LoRA rank {pair.a.shape[0]}, adapter_config.json says {rank}"
        )
    alpha = _pattern(options.get("alpha_pattern"), stem, options["lora_alpha"])
    ratio = _scaling(options, alpha, rank) / adapter.scaling
    if ratio != 1.0:
        pair.b = pair.b.to(torch.float32) * ratio


def _base_layers(model: torch.nn.Module | None) -> dict[tuple[int, str], Any]:
    """Linear layers of the base model by (layer, last part of the name), LoRA wrappers taken off."""
    found: dict[tuple[int, str], Any] = {}
    for name, module in model.named_modules() if model is not None else ():
        layer = get_layer_id(name)
        bare = unwrap_lora_layer(module)
        if layer is not None and hasattr(bare, "input_size") and hasattr(bare, "output_size"):
            leaf = name.removesuffix(".base_layer").rpartition(".")[2]
            found.setdefault((layer, leaf), bare)
    return found


def slice_widths(base_layer: Any) -> tuple[int, ...]:
    """Output features of a base linear layer over all tp ranks, one number per fused part."""
    if hasattr(base_layer, "total_num_kv_heads"):
        heads, kv_heads, size = base_layer.total_num_heads, base_layer.total_num_kv_heads, base_layer.head_size
        return heads * size, kv_heads * size, kv_heads * size
    sizes = getattr(base_layer, "output_sizes", None)
    return tuple(sizes) if sizes else (base_layer.output_size,)


def _complete_groups(
    where: str,
    layer: int,
    pairs: dict[str, _Pair],
    base_layers: dict[tuple[int, str], Any],
    ranks: dict[tuple[int, str], tuple[int, ...]],
    shared: set[tuple[int, str]],
) -> None:
    """Check shapes, record LoRA ranks, and fill q/k/v and gate/up groups up to what stock can stack."""
    for stem in list(pairs):
        parent, dot, leaf = stem.rpartition(".")
        fused = _PART_OF.get(leaf, leaf)
        base = base_layers.get((layer, fused))
        if base is None:
            raise AdapterError(f"{where}: tensor '{pairs[stem].a_name}' is for a module the base model does not have")
        widths = slice_widths(base)
        if leaf == fused:
            _check_shape(where, pairs[stem], base.input_size, sum(widths))
            ranks[layer, fused] = (_rank(pairs[stem]),)
            if leaf in FUSED:
                shared.add((layer, fused))
            continue
        if (layer, fused) in ranks:
            continue  # the group was completed at its first part
        parts = [pairs.get(parent + dot + part) for part in FUSED[fused]]
        for part, width in zip(parts, widths, strict=True):
            if part is not None:
                _check_shape(where, part, base.input_size, width)
        ranks[layer, fused] = tuple(0 if part is None else _rank(part) for part in parts)
        _fill(pairs, stem, parent + dot, FUSED[fused], widths)


def _rank(pair: _Pair) -> int:
    assert pair.a is not None
    return int(pair.a.shape[0])


def _check_shape(where: str, pair: _Pair, in_features: int, out_features: int) -> None:
    assert pair.a is not None and pair.b is not None
    for name, found, expected in (
        (pair.a_name, pair.a.shape[1], in_features),
        (pair.b_name, pair.b.shape[0], out_features),
    ):
        if found != expected:
            raise AdapterError(f"{where}: tensor '{name}' is {found} wide, the base model's module {expected}")


def _fill(
    pairs: dict[str, _Pair], stem: str, prefix: str, parts: tuple[str, ...], widths: tuple[int, ...]
) -> None:
    """Give every part of a group an A (0 rows if it has none) and a B of the group's largest LoRA rank."""
    model, leaf = pairs[stem], stem.removeprefix(prefix)
    assert model.a is not None and model.b is not None
    present = [pairs[prefix + part] for part in parts if prefix + part in pairs]
    widest = max(_rank(pair) for pair in present)
    for part, width in zip(parts, widths, strict=True):
        pair = pairs.get(prefix + part)
        if pair is None:
            rename = (prefix + leaf, prefix + part)
            pair = pairs[prefix + part] = _Pair(
                model.a_name.replace(*rename, 1),
                model.b_name.replace(*rename, 1),
                model.a.new_zeros((0, model.a.shape[1])),
                model.b.new_zeros((width, 0)),
            )
        assert pair.a is not None and pair.b is not None
        missing = widest - pair.b.shape[1]
        if missing:
            pair.b = torch.cat((pair.b, pair.b.new_zeros((width, missing))), dim=1)
