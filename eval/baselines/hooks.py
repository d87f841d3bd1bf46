"""Hooks that make stock SGLang comparable on a CPU: the link model for its copies, and HiCache without a GPU.

Nothing here is active unless the measuring command started the server: with ``launch.py``, which installs the
records of ``patches.py`` in the scheduler process. It sets :data:`ENV_LINK` to the emulated bandwidth in GB/s and
direction (0: no emulation). What the hooks do is reported in ``/server_info`` under ``baseline``, and the command
refuses to measure a server that does not report all of them in place.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from elora_sglang.eval.baselines import ENV_LINK
from elora_sglang.eval.baselines.streams import Device
from elora_sglang.runtime.transfers.link import Link

_device: Device | None = None


def device() -> Device:
    """The emulated device module of this process."""
    global _device
    if _device is None:
        link = Link(float(os.environ.get(ENV_LINK, "0")))
        _device = Device(lambda direction, size, earliest: link.issue(direction, [size], earliest)[0])
    return _device


# --- adapters -------------------------------------------------------------------------------------------------------


def adapter_bytes(adapter: Any) -> int:
    """Bytes of an adapter's weights, as they are copied into a slot buffer (its own rank, not the largest)."""
    layers = sum(w.numel() * w.element_size() for layer in adapter.layers for w in layer.weights.values())
    rest = sum(w.numel() * w.element_size() for w in (adapter.embedding_layers or {}).values())
    return int(layers + rest)


def load_adapter(
    original: Callable[..., Any], pool: Any, uid: Any, buffer_id: int, adapter: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND ``LoRAMemoryPool.load_lora_weight_to_buffer``: the copy into the slot takes the link's time.

    On the compute stream (stock's default) the forward pass waits for it; on the overlap loader's own stream the
    request does.
    """
    result = original(pool, uid, buffer_id, adapter, *args, **kwargs)
    if adapter is not None:
        device().copy("load", adapter_bytes(adapter))
        device().adapters += 1
    return result


def overlap_loader(original: Callable[..., None], loader: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND ``LoRAOverlapLoader.__init__``: its stream and events are those of the emulated device."""
    original(loader, *args, **kwargs)
    loader.device_module = device()
    loader.load_stream = device().Stream()
    loader.load_stream_context = device().stream(loader.load_stream)


# --- HiCache --------------------------------------------------------------------------------------------------------


def controller(original: Callable[..., None], instance: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND ``HiCacheController.__init__``: its streams, events and layer counters are the emulated device's."""
    from sglang.srt.managers import cache_controller
    from sglang.srt.mem_cache import l2_transfer

    setattr(l2_transfer, "device_module", device())  # noqa: B010  a module's global, not ours to declare
    setattr(cache_controller, "device_module", device())  # noqa: B010
    original(instance, *args, **kwargs)


def host_memory(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """AROUND ``alloc_with_host_register``: without a driver there is nothing to register memory with."""
    if not torch.cuda.is_available():
        kwargs["pin_memory"] = False
    return original(*args, **kwargs)


def load_layer(
    original: Callable[..., None],
    host_pool: Any,
    device_pool: Any,
    host_indices: torch.Tensor,
    device_indices: torch.Tensor,
    layer_id: int,
    io_backend: str,
    **kwargs: Any,
) -> None:
    """AROUND ``MHATokenToKVPoolHost.load_to_device_per_layer``: a torch copy of one layer, late by the link.

    Takes the place of ``transfer_kv_direct``, which the wheel has for GPUs only: backend ``direct``, layout
    ``layer_first``.
    """
    _require_direct(host_pool, io_backend)
    scale = float(os.environ.get("ELORA_EVAL_BREAK_LOADS", "1"))  # the negative control of the tests
    for target, source in (
        (host_pool.device_k_buffers[layer_id], host_pool.k_buffer[layer_id]),
        (host_pool.device_v_buffers[layer_id], host_pool.v_buffer[layer_id]),
    ):
        target[device_indices] = source[host_indices] * scale if scale != 1 else source[host_indices]
    device().copy("load", len(device_indices) * host_pool.size_per_token // host_pool.layer_num)


def save_layers(
    original: Callable[..., None],
    host_pool: Any,
    device_pool: Any,
    host_indices: torch.Tensor,
    device_indices: torch.Tensor,
    io_backend: str,
) -> None:
    """AROUND ``MHATokenToKVPoolHost.backup_from_device_all_layer``: torch copies of all layers, late by the link."""
    _require_direct(host_pool, io_backend)
    for layer in range(host_pool.layer_num):
        host_pool.k_buffer[layer][host_indices] = host_pool.device_k_buffers[layer][device_indices]
        host_pool.v_buffer[layer][host_indices] = host_pool.device_v_buffers[layer][device_indices]
    device().copy("save", len(device_indices) * host_pool.size_per_token)


def _require_direct(host_pool: Any, io_backend: str) -> None:
    if io_backend != "direct" or host_pool.layout != "layer_first":
        raise ValueError(
            "HiCache on a CPU needs --hicache-io-backend direct --hicache-mem-layout layer_first, got "
            f"{io_backend} and {host_pool.layout}"
        )
