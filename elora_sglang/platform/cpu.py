"""The platform class: what this CPU can do, and the settings that make a server start without further flags."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from elora_sglang.platform import threads

logger = logging.getLogger(__name__)

ATTENTION_BACKEND = "elora_cpu"
# Stock fills the whole memory with KV; on a CPU that is the machine's RAM. At 128 KiB a token (8B, bf16): 4 GiB.
DEFAULT_TOTAL_TOKENS = 32768
# Stock reserves room for activations by a GPU's measure, which can exceed the RAM (--chunked-prefill-size -1 did).
DEFAULT_MEM_FRACTION = 0.8
# Request rows are allocated in advance, each with a context length of slots.
DEFAULT_RUNNING_REQUESTS = 32
# LoRA backends that compute without a device kernel; any other choice cannot run here.
HOST_LORA_BACKENDS = ("torch_native", "elora")


class EloraCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Native-PyTorch SGLang on a CPU, with an attention of its own."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def __init__(self) -> None:
        super().__init__()
        _offer_attention_backend()

    def get_default_attention_backend(self) -> str:
        """The attention that pays only for new tokens after a cache hit."""
        return ATTENTION_BACKEND

    def is_pin_memory_available(self, device: Any = None) -> bool:
        """Never: there is no device to copy to."""
        return False

    def get_torch_profiler_activity_str(self) -> str:
        """The name under which a client asks for this device's profile."""
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        """The profiler activity that records this device."""
        return torch.profiler.ProfilerActivity.CPU

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Fill what the user left open, so that ``--device cpu`` is enough. Mutates ``server_args``.

        A LoRA backend that cannot work without an accelerator is replaced, whoever chose it: the default is one.
        """
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = DEFAULT_TOTAL_TOKENS
        if server_args.max_running_requests is None:
            server_args.max_running_requests = DEFAULT_RUNNING_REQUESTS
        if server_args.mem_fraction_static is None:
            server_args.mem_fraction_static = DEFAULT_MEM_FRACTION
        server_args.disable_custom_all_reduce = True
        if server_args.dtype == "auto" and _checkpoint_dtype(server_args.model_path) == "float32":
            server_args.dtype = "float32"
        if server_args.lora_backend not in HOST_LORA_BACKENDS:
            if server_args.enable_lora or server_args.lora_paths:
                logger.info("LoRA backend torch_native: %s needs a GPU", server_args.lora_backend)
            server_args.lora_backend = HOST_LORA_BACKENDS[0]
        threads.bind_ranks(server_args.tp_size * server_args.pp_size * server_args.dp_size)

    def init_backend(self) -> None:
        """Once per worker, before the model runner exists: register the attention, set the number of threads."""
        from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

        from elora_sglang.platform.attention import create

        ATTENTION_BACKENDS.setdefault(ATTENTION_BACKEND, create)
        chosen = os.environ.get("OMP_NUM_THREADS")
        count = threads.default_threads(len(threads.usable_cores()), threads.bound_ranks(), chosen)
        if count is not None:
            torch.set_num_threads(count)


def _checkpoint_dtype(model_path: str) -> str | None:
    """The dtype a local checkpoint was saved in; SGLang would turn float32 into float16, which is slow here."""
    try:
        config = json.loads((Path(model_path) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _offer_attention_backend() -> None:
    """Make ``--attention-backend elora_cpu`` a valid choice, and the default for ``--device cpu``."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    if ATTENTION_BACKEND not in choices.ATTENTION_BACKEND_CHOICES:
        choices.add_attention_backend_choices([ATTENTION_BACKEND])
        register_resolution_hook("handle_cpu_backends")(default_attention)


def default_attention(server_args: Any, previous: Any) -> None:
    """Resolution step: our attention where the user named none, then the stock step. Mutates ``server_args``."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    settings = resolving_view(server_args)
    if settings.device == "cpu" and settings.attention_backend is None:
        declare_resolution(server_args, "elora_cpu", attention_backend=ATTENTION_BACKEND)
    previous(server_args)
