"""Live servers for the tests; the code of servers is the measuring commands' own (``eval/server.py``).

One boot per test module: make the server a module-scoped fixture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elora_sglang.eval.server import (
    LiveServer,
    Reply,
    clean_env,
    free_port,
    kill_group,
    run,
    server,
    start,
    wait_ready,
)

ROOT = Path(__file__).resolve().parents[2]

__all__ = [
    "ROOT",
    "LiveServer",
    "Reply",
    "clean_env",
    "forked_engine",
    "free_port",
    "kill_group",
    "run",
    "server",
    "start",
    "wait_ready",
]


@contextlib.contextmanager
def forked_engine(**server_args: Any) -> Iterator[Any]:
    """An ``sglang.Engine`` whose processes are forked: up in seconds, and hooks set in this process reach them.

    Only for a script in a process of its own (``live.run([sys.executable, script, ...])``) that has imported
    SGLang but computed nothing with torch yet: a fork after torch compute deadlocks in OpenMP.
    """
    import multiprocessing

    import sglang

    original = multiprocessing.set_start_method

    def keep_fork(method: str | None, force: bool = False) -> None:
        original("fork", force=True)

    multiprocessing.set_start_method = keep_fork  # SGLang asks for "spawn"
    try:
        engine = sglang.Engine(device="cpu", **server_args)
    finally:
        multiprocessing.set_start_method = original
    try:
        yield engine
    finally:
        engine.shutdown()
