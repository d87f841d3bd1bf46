"""Adapters' files, read again: in the background, and only as the content that the adapter's version names."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from elora_sglang.runtime.adapters.files import AdapterError, read_folder
from elora_sglang.runtime.adapters.versions import is_version

if TYPE_CHECKING:
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_registry import LoRARef

Result = TypeVar("Result")

#: What SGLang calls the path of an adapter that came as tensors in a request.
NO_FILE = "__tensor__"


def has_file(ref: LoRARef) -> bool:
    """Whether the adapter came from a folder, which may be gone by now."""
    return bool(ref.lora_path) and ref.lora_path != NO_FILE


def read_version(ref: LoRARef, like: LoRAAdapter, base_model: torch.nn.Module) -> LoRAAdapter:
    """Read the adapter's folder anew: a new adapter with weights, in host memory. Mutates nothing.

    Args:
        ref: SGLang's reference; its ``lora_id`` names the content that the folder must still have.
        like: the loaded adapter, which may have lost its weights.

    Raises:
        AdapterError: a file is missing, broken, or holds other content than the loaded version.
    """
    files = read_folder(ref.lora_path)
    if not is_version(ref.lora_id, files.version()):
        raise AdapterError(
            files.weights_file,
            f"holds other content than when adapter {ref.lora_name!r} was loaded",
            "Load it again with POST /load_lora_adapter, or put the former files back.",
        )
    adapter = type(like)(
        like.uid, like.config, like.base_hf_config, like.load_config, like.lora_backend, base_model=base_model
    )
    adapter.initialize_weights_from_tensors(files.tensors)
    return adapter


class BackgroundReader(Generic[Result]):
    """Runs jobs one after the other on a thread of its own; the caller asks which are done.

    One thread: a disk serves one sequential read best, and packing competes with the scheduler for CPU.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._jobs: dict[str, Future[Result]] = {}
        self._where: dict[str, str] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._jobs

    def start(self, key: str, where: str, job: Callable[[], Result]) -> None:
        """Queue ``job``. ``where``: what it reads, for messages. Raises ValueError while ``key`` is in flight."""
        if key in self._jobs:
            raise ValueError(f"elora: {key} is being read already")
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="elora-read")
        self._where[key] = where
        self._jobs[key] = self._pool.submit(_without_grad, job)

    def done(self, *, wait: bool = False) -> list[tuple[str, Result | AdapterError]]:
        """Finished jobs in the order of their start, each once; ``wait``: all jobs."""
        finished: list[tuple[str, Result | AdapterError]] = []
        for key in list(self._jobs):
            if not wait and not self._jobs[key].done():
                continue
            job, where = self._jobs.pop(key), self._where.pop(key)
            finished.append((key, as_result(where, job.result)))
        return finished


def as_result(where: str, job: Callable[[], Result]) -> Result | AdapterError:
    """What ``job`` returns, or the fault it ends in as an :class:`AdapterError` about ``where``."""
    try:
        return job()
    except AdapterError as error:
        return error
    except Exception as error:  # a file can break any step, and the scheduler must outlive it
        fault = " ".join(f"cannot be read ({type(error).__name__}: {error})".split())
        return AdapterError(where, fault, "Load the adapter again.")


def _without_grad(job: Callable[[], Any]) -> Any:
    # Pools made in SGLang's inference mode can be written in that mode only.
    with torch.inference_mode():
        return job()
