"""Check an adapter against the base model before it is accepted. Pure: no files, no server state."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from elora_sglang.runtime.adapters.files import AdapterError, AdapterFiles

#: Names under which ``--lora-target-modules`` may list several modules at once.
_FUSED_NAMES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

_TENSOR_NAME = re.compile(
    r"(?:base_model\.model\.)?(?:model\.)?layers\.(?P<layer>\d+)\.(?P<parent>\w+)\.(?P<module>\w+)"
    r"\.lora_(?P<side>[AB])\.weight"
)

_VOCABULARY_MODULES = ("embed_tokens", "lm_head", "embeddings", "word_embeddings", "unembed_tokens")

#: Initialisations that change the *base* weights while training: the saved A and B alone are not the adapter.
_BASE_CHANGING_INIT = ("pissa", "olora", "corda", "loftq")

#: Config fields that must be unset, and what they are; every one changes what the adapter computes.
_UNSUPPORTED_FIELDS = {
    "modules_to_save": "fully trained modules",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "LoRA on bare parameters",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "a bias on B",
    "fan_in_fan_out": "transposed (Conv1D) base layers",
}

_RETRAIN = "Train or merge it without that; --elora serves plain LoRA and rsLoRA on linear layers."


@dataclass(frozen=True)
class BaseModelShape:
    """What an adapter has to fit: the base model's linear layers.

    Attributes:
        layers: number of decoder layers.
        vocabulary: number of token ids.
        linear: "parent.module" -> (input features, output features), unsharded, the same in every layer.
    """

    layers: int
    vocabulary: int
    linear: Mapping[str, tuple[int, int]]

    @classmethod
    def from_config(cls, config: Any) -> BaseModelShape:
        """From a Hugging Face text config of a dense decoder-only model."""
        hidden = config.hidden_size
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        inner = config.intermediate_size
        q, kv = heads * head_dim, kv_heads * head_dim
        linear = {"self_attn.o_proj": (q, hidden), "mlp.down_proj": (inner, hidden)}
        if str(getattr(config, "model_type", "")).startswith("phi3"):
            linear |= {"self_attn.qkv_proj": (hidden, q + 2 * kv), "mlp.gate_up_proj": (hidden, 2 * inner)}
        else:
            linear |= {
                "self_attn.q_proj": (hidden, q),
                "self_attn.k_proj": (hidden, kv),
                "self_attn.v_proj": (hidden, kv),
                "mlp.gate_proj": (hidden, inner),
                "mlp.up_proj": (hidden, inner),
            }
        return cls(int(config.num_hidden_layers), int(config.vocab_size), linear)

    @property
    def modules(self) -> list[str]:
        return sorted(path.rsplit(".", 1)[1] for path in self.linear)


@dataclass(frozen=True)
class CheckedAdapter:
    """An adapter that passed :func:`check`, in the form SGLang's LoRA manager takes.

    Attributes:
        config: PEFT config with ``target_modules`` as the list of modules that have tensors.
        tensors: the adapter's tensors as read.
        version: content hash, 64 hex digits.
    """

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    version: str


def check(
    files: AdapterFiles,
    base: BaseModelShape,
    *,
    target_modules: Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
) -> CheckedAdapter:
    """Accept ``files`` for this base model, or say what is wrong. Mutates nothing.

    Args:
        target_modules: modules the server was started for; None or {"all"} for any.
        dtype: dtype the weights will be served in; values that overflow in it are a fault.

    Raises:
        AdapterError: with the file, the fault and what to do.
    """
    _check_config(files, base)
    modules = adapted_modules(files, base)
    _check_declared(files, base, modules, target_modules)
    for name, tensor in files.tensors.items():
        _check_values(files, name, tensor, dtype)
    return CheckedAdapter({**files.config, "target_modules": modules}, files.tensors, files.version())


def _check_config(files: AdapterFiles, base: BaseModelShape) -> None:
    config, file = files.config, files.config_file
    kind = config.get("peft_type")
    if str(kind).upper() != "LORA":
        raise AdapterError(file, f"peft_type is {kind!r}, only LORA is served", _RETRAIN)
    if config.get("use_dora"):
        raise AdapterError(file, "use_dora is set, DoRA is not served", _RETRAIN)
    for field, what in _UNSUPPORTED_FIELDS.items():
        if config.get(field):
            raise AdapterError(file, f"{field} is set, {what} cannot be served", _RETRAIN)
    if (bias := config.get("bias", "none")) != "none":
        raise AdapterError(file, f"bias is {bias!r}, trained biases cannot be served", _RETRAIN)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING_INIT):
        raise AdapterError(
            file,
            f"init_lora_weights is {start!r}, which needs a changed base model",
            "Save it with peft's path_initial_model_for_weight_conversion, which makes it plain LoRA.",
        )
    for where, lora_rank in _values(files, "r", "rank_pattern"):
        if not isinstance(lora_rank, int) or isinstance(lora_rank, bool) or lora_rank < 1:
            raise AdapterError(
                file, f"LoRA rank {where} is {lora_rank!r}, not a positive integer", f"Mend {where}."
            )
    for where, alpha in _values(files, "lora_alpha", "alpha_pattern"):
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
            raise AdapterError(file, f"{where} is {alpha!r}, not a finite number", f"Mend {where}.")
    extra = [token for token, number in files.added_tokens.items() if number >= base.vocabulary]
    if extra:
        raise AdapterError(
            files.config_file.replace("adapter_config.json", "added_tokens.json"),
            f"adds {len(extra)} tokens beyond the base vocabulary of {base.vocabulary}, first {extra[0]!r}",
            "Train it without new tokens.",
        )


def _values(files: AdapterFiles, field: str, pattern_field: str) -> list[tuple[str, Any]]:
    """(name for messages, value) of a config field and of each entry of its per-module pattern."""
    patterns = files.config.get(pattern_field) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(files.config_file, f"{pattern_field} is not an object", f"Mend {pattern_field}.")
    return [
        (field, files.config.get(field)),
        *((f"{pattern_field}[{key!r}]", value) for key, value in patterns.items()),
    ]


def _lora_rank_of(files: AdapterFiles, name: str) -> int:
    """LoRA rank of a tensor's module: by PEFT's rule the first ``rank_pattern`` key that ends its name."""
    stem = re.split(r"\.lora_[AB]\.", name)[0]
    for key, value in (files.config.get("rank_pattern") or {}).items():
        if re.match(rf"(.*\.)?({key})$", stem):
            return int(value)
    return int(files.config["r"])


def adapted_modules(files: AdapterFiles, base: BaseModelShape) -> list[str]:
    """Names of the modules that have tensors, sorted; raises AdapterError for a tensor without its place,
    its shape or its partner. Reads names and shapes only."""
    file = files.weights_file
    if not files.tensors:
        raise AdapterError(file, "holds no tensors", "Save the adapter again.")
    pairs: dict[tuple[int, str], dict[str, str]] = {}
    for name, tensor in files.tensors.items():
        layer, path, side = _place(file, name, base)
        pair = pairs.setdefault((layer, path), {})
        if side in pair:
            raise AdapterError(file, f"{name!r} and {pair[side]!r} are the same weight", "Keep one of them.")
        n_in, n_out = base.linear[path]
        lora_rank = _lora_rank_of(files, name)
        shape, must = list(tensor.shape), ([lora_rank, n_in] if side == "A" else [n_out, lora_rank])
        if shape != must:
            raise AdapterError(
                file,
                f"{name!r} has shape {shape}, the base model and LoRA rank {lora_rank} need {must}",
                "Use the base model it was trained on, and its own adapter_config.json.",
            )
        pair[side] = name
    for (layer, path), pair in pairs.items():
        if len(pair) != 2:
            ((side, name),) = pair.items()
            other = "B" if side == "A" else "A"
            fault = f"{name!r} has no lora_{other} beside it (layer {layer}, {path})"
            raise AdapterError(file, fault, "Save the adapter again.")
    return sorted({path.rsplit(".", 1)[1] for _, path in pairs})


def _place(file: str, name: str, base: BaseModelShape) -> tuple[int, str, str]:
    if "lora_magnitude_vector" in name:
        raise AdapterError(file, f"{name!r} is a DoRA magnitude, DoRA is not served", _RETRAIN)
    if "lora_embedding_" in name or any(f"{module}." in f"{name}." for module in _VOCABULARY_MODULES):
        raise AdapterError(file, f"{name!r} adapts the vocabulary, only linear layers are served", _RETRAIN)
    found = _TENSOR_NAME.fullmatch(name)
    path = f"{found['parent']}.{found['module']}" if found else ""
    if found is None or path not in base.linear:
        raise AdapterError(
            file,
            f"tensor {name!r} matches no module of the base model",
            f"Known modules: {', '.join(base.modules)}.",
        )
    layer = int(found["layer"])
    if layer >= base.layers:
        raise AdapterError(
            file,
            f"{name!r} is for layer {layer}, the base model has {base.layers}",
            "Use the base model it was trained on.",
        )
    return layer, path, found["side"]


def _check_declared(
    files: AdapterFiles, base: BaseModelShape, present: list[str], served: Iterable[str] | None
) -> None:
    file, declared = files.config_file, files.config.get("target_modules")
    if isinstance(declared, list):
        names = [str(module).rsplit(".", 1)[-1] for module in declared]
        for name in names:
            if name in _VOCABULARY_MODULES:
                raise AdapterError(file, f"target module {name!r} is the vocabulary's, not served", _RETRAIN)
            if name not in base.modules:
                raise AdapterError(
                    file,
                    f"unknown target module {name!r}, the base model has {', '.join(base.modules)}",
                    "Use the base model it was trained on.",
                )
        missing = sorted(set(names) - set(present))
        if missing:
            fault = f"declares {', '.join(missing)}, but {files.weights_file} has no tensor for them"
            raise AdapterError(file, fault, "Save the adapter again, or take them out of target_modules.")
        undeclared = sorted(set(present) - set(names))
        if undeclared:
            fault = f"has tensors for {', '.join(undeclared)}, which target_modules does not list"
            raise AdapterError(files.weights_file, fault, "Use the adapter's own adapter_config.json.")
    elif not isinstance(declared, str) or not declared:
        raise AdapterError(file, f"target_modules is {declared!r}, not a list or a pattern", "Mend it.")
    allowed = {part for name in served or ("all",) for part in _FUSED_NAMES.get(name, (name,))}
    if "all" not in allowed and (refused := sorted(set(present) - allowed)):
        fault = f"adapts {', '.join(refused)}, which --lora-target-modules does not list"
        raise AdapterError(file, fault, "Start the server with these modules, or without the flag.")


def _check_values(files: AdapterFiles, name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> None:
    # The largest magnitude shows NaN and Inf as well, in one pass and without a temporary.
    low, high = torch.aminmax(tensor.detach())
    largest = max(abs(float(low)), abs(float(high)))
    if not math.isfinite(largest) or math.isnan(float(low)) or math.isnan(float(high)):
        raise AdapterError(
            files.weights_file,
            f"{name!r} contains NaN or infinite values",
            "The training diverged; train it again.",
        )
    if dtype is not None and largest > torch.finfo(dtype).max:
        fault = f"{name!r} holds {largest:.3g}, which overflows in the serving dtype {dtype}"
        raise AdapterError(files.weights_file, fault, "Serve with --dtype bfloat16 or float32.")
