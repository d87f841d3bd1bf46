"""What ``--elora`` does not work with (yet), refused at start-up: one row, one line, one test each.

Rows about flags are looked at twice, on the arguments as given and again on the resolved ones, because
SGLang's model-specific defaults may turn a feature on. Rows about the model need its configuration, so
they are looked at once it has been read.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

#: KV cache types whose slots are plain rows that a weight can lie in.
PLAIN_KV_TYPES = ("auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2")

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
_TRUE = ("1", "true", "yes", "y")


@dataclasses.dataclass(frozen=True)
class Refusal:
    """One unsupported setting.

    Args:
        flag: the flag, environment variable or kind of model, as people write it.
        applies: whether it is in use; gets the server arguments (or, for model rows, the model's
            configuration) and must not change them.
        advice: what to do instead.
    """

    flag: str
    applies: Callable[[Any], bool]
    advice: str

    @property
    def message(self) -> str:
        return f"{self.flag} does not work with --elora; {self.advice}"


def _on(field: str) -> Callable[[Any], bool]:
    return lambda args: bool(getattr(args, field))


def _above(field: str, limit: int) -> Callable[[Any], bool]:
    return lambda args: (getattr(args, field) or 0) > limit


def _other_than(field: str, *allowed: Any) -> Callable[[Any], bool]:
    return lambda args: getattr(args, field) not in allowed


def _environment(variable: str) -> Callable[[Any], bool]:
    return lambda args: os.environ.get(variable, "").lower() in _TRUE


_OWN_TIER = "remove it (ELORA keeps its own cache)"

FLAGS: tuple[Refusal, ...] = (
    Refusal("--dp-size above 1", _above("dp_size", 1), "start one server per replica behind a router"),
    Refusal("DP attention (--attn-dp-size above 1)", _above("attn_dp_size", 1), "use --tp-size alone"),
    Refusal("DP attention (--enable-dp-attention)", _on("enable_dp_attention"), "use --tp-size alone"),
    Refusal("--pp-size above 1", _above("pp_size", 1), "use --tp-size instead"),
    Refusal("--speculative-algorithm", _other_than("speculative_algorithm", None), "remove it"),
    Refusal(
        "--disaggregation-mode",
        _other_than("disaggregation_mode", "null"),
        "serve prefill and decode together",
    ),
    Refusal("--enable-pdmux", _on("enable_pdmux"), "remove it"),
    Refusal("--dcp-size above 1", _above("dcp_size", 1), "use --tp-size instead"),
    Refusal("--attn-cp-size above 1", _above("attn_cp_size", 1), "use --tp-size instead"),
    Refusal("--enable-prefill-cp", _on("enable_prefill_cp"), "remove it"),
    Refusal("--enable-kv-cache-sharding", _on("enable_kv_cache_sharding"), "remove it"),
    Refusal(
        "--kv-cache-dtype other than bf16 and fp8",
        _other_than("kv_cache_dtype", *PLAIN_KV_TYPES),
        f"use one of {', '.join(PLAIN_KV_TYPES)}",
    ),
    Refusal(
        "SGLANG_USE_HND_KVCACHE",
        _environment("SGLANG_USE_HND_KVCACHE"),
        "unset it: the KV layout must be NHD",
    ),
    Refusal(
        "SGLANG_AITER_KV_CACHE_LAYOUT=vectorized_5d",
        lambda args: os.environ.get("SGLANG_AITER_KV_CACHE_LAYOUT", "").lower() == "vectorized_5d",
        "unset it: the KV layout must be NHD",
    ),
    Refusal("--enable-page-major-kv-layout", _on("enable_page_major_kv_layout"), "remove it"),
    Refusal("--enable-unified-memory", _on("enable_unified_memory"), "remove it"),
    Refusal("--enable-hisparse", _on("enable_hisparse"), "remove it"),
    Refusal("--prefill-only-disable-kv-cache", _on("prefill_only_disable_kv_cache"), "remove it"),
    Refusal(
        "--lora-target-modules embed_tokens or lm_head",
        lambda args: bool({"embed_tokens", "lm_head"} & set(args.lora_target_modules or ())),
        "name linear layers only, or leave the flag out",
    ),
    Refusal(
        "--enable-lora set to False",
        lambda args: args.enable_lora is False,
        "remove it: --elora is about LoRA",
    ),
    Refusal(
        "--experts-shared-outer-loras", _on("experts_shared_outer_loras"), "remove it: no LoRA on experts"
    ),
    Refusal("--lora-use-virtual-experts", _on("lora_use_virtual_experts"), "remove it: no LoRA on experts"),
    Refusal("--enable-streaming-session", _on("enable_streaming_session"), "remove it"),
    Refusal("--enable-session-radix-cache", _on("enable_session_radix_cache"), "remove it"),
    Refusal(
        "--disable-radix-cache", _on("disable_radix_cache"), "remove it: adapters live in the radix tree"
    ),
    Refusal(
        "--radix-cache-backend",
        _other_than("radix_cache_backend", None, "elora"),
        "remove it: --elora brings its own",
    ),
    Refusal("--sleep-on-idle", _on("sleep_on_idle"), "remove it"),
    Refusal("--enable-memory-saver", _on("enable_memory_saver"), "remove it: the pool cannot be released"),
    Refusal(
        "--custom-weight-loader",
        _on("custom_weight_loader"),
        "remove it: base weights cannot be updated while serving",
    ),
    Refusal(
        "--checkpoint-engine-wait-weights-before-ready",
        _on("checkpoint_engine_wait_weights_before_ready"),
        "remove it: base weights cannot be updated while serving",
    ),
    Refusal("--grpc-mode", _on("grpc_mode"), "use the HTTP server"),
    Refusal("--smg-grpc-mode", _on("smg_grpc_mode"), "use the HTTP server"),
    Refusal("--grpc-port", _other_than("grpc_port", None), "use the HTTP server"),
    Refusal("SGLANG_RUST_SERVER", _environment("SGLANG_RUST_SERVER"), "unset it: use the Python HTTP server"),
    Refusal("--tokenizer-worker-num above 1", _above("tokenizer_worker_num", 1), "use one tokenizer worker"),
    Refusal("--use-ray", _on("use_ray"), "start the server without Ray"),
    Refusal("--encoder-only", _on("encoder_only"), "remove it"),
    Refusal("--dllm-algorithm", _other_than("dllm_algorithm", None), "remove it"),
    Refusal("--enable-two-batch-overlap", _on("enable_two_batch_overlap"), "remove it"),
    Refusal("--enable-hierarchical-cache", _on("enable_hierarchical_cache"), _OWN_TIER),
    Refusal("--enable-lmcache", _on("enable_lmcache"), _OWN_TIER),
    Refusal("--enable-flexkv", _on("enable_flexkv"), _OWN_TIER),
    Refusal("--enable-unified-cache-external-linker", _on("enable_unified_cache_external_linker"), _OWN_TIER),
    Refusal("--hicache-storage-backend", _other_than("hicache_storage_backend", None), _OWN_TIER),
    Refusal("--kv-events-config", _on("kv_events_config"), "remove it: the tree publishes no KV events"),
)


def _is_mla(model: Any) -> bool:
    return model.attention_arch.name == "MLA"


def _is_hybrid(model: Any) -> bool:
    from sglang.srt.configs.hybrid_arch import mambaish_config

    return model.attention_arch.name == "SSM" or mambaish_config(model) is not None


def _is_mixture_of_experts(model: Any) -> bool:
    text = model.hf_text_config
    return any(
        (getattr(text, name, None) or 0) > 1 for name in _EXPERTS if _is_number(getattr(text, name, None))
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int)


_OTHER_MODEL = "serve it without --elora"

MODELS: tuple[Refusal, ...] = (
    Refusal("a model with multi-head latent attention (MLA)", _is_mla, _OTHER_MODEL),
    Refusal(
        "a model with hybrid sliding-window attention (SWA)", lambda m: bool(m.is_hybrid_swa), _OTHER_MODEL
    ),
    Refusal("a model with Mamba or linear attention layers", _is_hybrid, _OTHER_MODEL),
    Refusal("a mixture-of-experts (MoE) model", _is_mixture_of_experts, _OTHER_MODEL),
)


def refused_flags(args: Any) -> Iterator[Refusal]:
    """Flag rows that apply to these server arguments, raw or resolved."""
    return (row for row in FLAGS if row.applies(args))


def refused_models(model_config: Any) -> Iterator[Refusal]:
    """Model rows that apply to SGLang's ``ModelConfig``."""
    return (row for row in MODELS if row.applies(model_config))
