"""How many threads a worker takes, which cores a tensor-parallel rank is told, and no kernels for either."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

logger = logging.getLogger(__name__)

# Up to this many cores one thread per process: server, scheduler and detokenizer run side by side.
SINGLE_THREAD_CORES = 4
BINDING = "SGLANG_CPU_OMP_THREADS_BIND"


def usable_cores() -> list[int]:
    """Ids of the cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def default_threads(cores: int, ranks: int, chosen: str | None) -> int | None:
    """Threads for one worker of ``ranks``, or None to leave what ``OMP_NUM_THREADS`` (``chosen``) says.

    OpenMP's threads spin while they wait. A worker that takes every core fights with the two other processes of
    its own server, and was measured forty times slower on two cores.
    """
    if chosen:
        return None
    return 1 if cores <= SINGLE_THREAD_CORES else max(1, cores // 2 // ranks)


def binding(cores: Sequence[int], ranks: int) -> str:
    """SGLang's core list per rank, ``0,1|2,3``; ranks share cores when there are fewer cores than ranks."""
    if len(cores) < ranks:
        return "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
    share = len(cores) // ranks
    return "|".join(
        ",".join(str(core) for core in cores[rank * share : (rank + 1) * share]) for rank in range(ranks)
    )


def bound_ranks() -> int:
    """Ranks of this server, from the binding that its launcher left in the environment."""
    return os.environ.get(BINDING, "").count("|") + 1


def bind_ranks(ranks: int) -> None:
    """Tell several ranks on one machine their cores, unless the user did; SGLang refuses to start them otherwise.

    Mutates the environment, which the workers inherit.
    """
    if ranks > 1 and not os.environ.get(BINDING):
        os.environ[BINDING] = binding(usable_cores(), ranks)


def without_kernel_threads(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """AROUND hook: SGLang's thread binding is a compiled kernel's; without that kernel there is nothing to bind.

    Stock calls it on every ARM machine, where the released wheel does not have it.
    """
    if hasattr(torch.ops.sgl_kernel, "init_cpu_threads_env"):
        original(*args, **kwargs)
    else:
        logger.info("%d torch threads in this worker; ranks reduce over gloo", torch.get_num_threads())
