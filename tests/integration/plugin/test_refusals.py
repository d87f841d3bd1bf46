"""Every refusal at start-up: it applies to what it names, to nothing else, and says so in one line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from elora_sglang.integration.plugin import config, refusals
from elora_sglang.integration.plugin import launch as engine
from elora_sglang.integration.plugin.config import EloraConfig
from elora_sglang.integration.plugin.install import uninstall
from elora_sglang.integration.plugin.verify import Refused
from elora_sglang.patches.base import discover

#: Row → a setting it refuses: ServerArgs fields, or one environment variable.
REFUSED: dict[str, dict[str, Any]] = {
    "--dp-size above 1": {"dp_size": 2},
    "DP attention (--attn-dp-size above 1)": {"attn_dp_size": 2},
    "DP attention (--enable-dp-attention)": {"enable_dp_attention": True},
    "--pp-size above 1": {"pp_size": 2},
    "--speculative-algorithm": {"speculative_algorithm": "EAGLE"},
    "--disaggregation-mode": {"disaggregation_mode": "decode"},
    "--enable-pdmux": {"enable_pdmux": True},
    "--dcp-size above 1": {"dcp_size": 2},
    "--attn-cp-size above 1": {"attn_cp_size": 2},
    "--enable-prefill-cp": {"enable_prefill_cp": True},
    "--enable-kv-cache-sharding": {"enable_kv_cache_sharding": True},
    "--kv-cache-dtype other than bf16 and fp8": {"kv_cache_dtype": "mxfp8"},
    "SGLANG_USE_HND_KVCACHE": {"SGLANG_USE_HND_KVCACHE": "1"},
    "SGLANG_AITER_KV_CACHE_LAYOUT=vectorized_5d": {"SGLANG_AITER_KV_CACHE_LAYOUT": "vectorized_5d"},
    "--enable-page-major-kv-layout": {"enable_page_major_kv_layout": True},
    "--enable-unified-memory": {"enable_unified_memory": True},
    "--enable-hisparse": {"enable_hisparse": True},
    "--prefill-only-disable-kv-cache": {"prefill_only_disable_kv_cache": True},
    "--lora-target-modules embed_tokens or lm_head": {"lora_target_modules": ["q_proj", "lm_head"]},
    "--enable-lora set to False": {"enable_lora": False},
    "--experts-shared-outer-loras": {"experts_shared_outer_loras": True},
    "--lora-use-virtual-experts": {"lora_use_virtual_experts": True},
    "--enable-streaming-session": {"enable_streaming_session": True},
    "--enable-session-radix-cache": {"enable_session_radix_cache": True},
    "--disable-radix-cache": {"disable_radix_cache": True},
    "--radix-cache-backend": {"radix_cache_backend": "flexkv"},
    "--sleep-on-idle": {"sleep_on_idle": True},
    "--enable-memory-saver": {"enable_memory_saver": True},
    "--custom-weight-loader": {"custom_weight_loader": ["package.loader"]},
    "--checkpoint-engine-wait-weights-before-ready": {"checkpoint_engine_wait_weights_before_ready": True},
    "--grpc-mode": {"grpc_mode": True},
    "--smg-grpc-mode": {"smg_grpc_mode": True},
    "--grpc-port": {"grpc_port": 50051},
    "SGLANG_RUST_SERVER": {"SGLANG_RUST_SERVER": "true"},
    "--tokenizer-worker-num above 1": {"tokenizer_worker_num": 2},
    "--use-ray": {"use_ray": True},
    "--encoder-only": {"encoder_only": True},
    "--dllm-algorithm": {"dllm_algorithm": "LowConfidence"},
    "--enable-two-batch-overlap": {"enable_two_batch_overlap": True},
    "--enable-hierarchical-cache": {"enable_hierarchical_cache": True},
    "--enable-lmcache": {"enable_lmcache": True},
    "--enable-flexkv": {"enable_flexkv": True},
    "--enable-unified-cache-external-linker": {"enable_unified_cache_external_linker": True},
    "--hicache-storage-backend": {"hicache_storage_backend": "file"},
    "--kv-events-config": {"kv_events_config": "{}"},
}


def model(arch: str = "MHA", *, swa: bool = False, hf_config: Any = None, **text: Any) -> Any:
    """What the model rows read of SGLang's ModelConfig."""
    from transformers import LlamaConfig

    return SimpleNamespace(
        attention_arch=SimpleNamespace(name=arch),
        is_hybrid_swa=swa,
        hf_config=hf_config or LlamaConfig(architectures=["LlamaForCausalLM"]),
        hf_text_config=SimpleNamespace(**text),
        linear_attn_registry_result=None,
    )


def mamba_model() -> Any:
    from sglang.srt.configs import FalconH1Config

    return model(hf_config=FalconH1Config())


MODELS: dict[str, Any] = {
    "a model with multi-head latent attention (MLA)": lambda: model("MLA"),
    "a model with hybrid sliding-window attention (SWA)": lambda: model(swa=True),
    "a model with Mamba or linear attention layers": mamba_model,
    "a mixture-of-experts (MoE) model": lambda: model(num_local_experts=8),
}


@pytest.fixture(autouse=True)
def stock_afterwards(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv(config.ENV_ENABLED, "0")
    yield
    uninstall(discover())


def test_every_row_has_a_test() -> None:
    assert set(REFUSED) == {row.flag for row in refusals.FLAGS}
    assert set(MODELS) == {row.flag for row in refusals.MODELS}


@pytest.mark.parametrize("row", refusals.FLAGS, ids=lambda row: row.flag)
def test_a_flag_is_refused_by_its_row_and_no_other(
    row: refusals.Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = REFUSED[row.flag]
    fields = {name: value for name, value in setting.items() if not name.isupper()}
    for name in set(setting) - set(fields):
        monkeypatch.setenv(name, setting[name])
    server_args = ServerArgs(model_path="model", **fields)
    assert list(refusals.refused_flags(server_args)) == [row]
    with pytest.raises(Refused) as refused:
        engine.apply_settings(server_args, EloraConfig(enabled=True))
    message = str(refused.value.code)
    assert message.startswith(f"elora: {row.flag} does not work with --elora; ")
    assert "\n" not in message and len(message) < 160
    # Stock SGLang is not ELORA's to judge.
    engine.apply_settings(ServerArgs(model_path="model", **fields), EloraConfig())


def test_plain_arguments_are_not_refused() -> None:
    for given in (
        {},
        {"kv_cache_dtype": "fp8_e4m3"},
        {"tp_size": 2},
        {"page_size": 16},
        {"radix_cache_backend": "elora"},
    ):
        assert not list(refusals.refused_flags(ServerArgs(model_path="model", **given)))


@pytest.mark.parametrize("row", refusals.MODELS, ids=lambda row: row.flag)
def test_a_model_is_refused_by_its_row_and_no_other(row: refusals.Refusal) -> None:
    assert list(refusals.refused_models(MODELS[row.flag]())) == [row]


def test_a_plain_model_is_not_refused() -> None:
    assert not list(refusals.refused_models(model()))
    assert not list(refusals.refused_models(model(num_experts=None)))
    assert not list(refusals.refused_models(model(num_local_experts=1)))


def test_a_flag_that_resolution_turned_on_is_refused_at_the_end() -> None:
    from sglang.srt.arg_groups.overrides import declare_resolution

    server_args = engine.apply_settings(ServerArgs(model_path="model"), EloraConfig(enabled=True))
    declare_resolution(server_args, "a model's default", disable_radix_cache=True)
    with pytest.raises(Refused, match="--disable-radix-cache"):
        engine.final_checks(server_args, lambda args: None)


def test_a_model_is_refused_at_the_end_of_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.arg_groups import overrides

    server_args = engine.apply_settings(ServerArgs(model_path="model"), EloraConfig(enabled=True))
    monkeypatch.setattr(overrides, "model_config_of", lambda args: model("MLA"))
    with pytest.raises(Refused, match=r"multi-head latent attention \(MLA\)"):
        engine.final_checks(server_args, lambda args: None)
