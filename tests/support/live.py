"""Live servers for the tests; the code is the measuring commands' own (``eval/server.py``).

One boot per test module: make the server a module-scoped fixture.
"""

from __future__ import annotations

from pathlib import Path

from elora_sglang.eval.server import (
    LiveServer,
    Reply,
    clean_env,
    forked_engine,
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
