"""Real SGLang servers for measurements and tests: one process group each, on a free loopback port, killed for certain.

    with server(model, *flags, log_dir=tmp) as live:   # python -m sglang.launch_server ...
        live.generate("Hello", lora_path="sql", max_new_tokens=8)["text"]

    with forked_engine(model_path=...) as engine:             # only in a process of its own, see there

One boot per test module: make the server a module-scoped fixture. This module imports neither torch nor
sglang at its top, so that a test process stays clean.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_started: list[subprocess.Popen[bytes]] = []

#: Below those that Linux and others hand out.
_FIXED_PORTS = (20_000, 32_000)

LOG_TAIL = 60  # lines of a server's log shown when it does not come up


def clean_env(**extra: str) -> dict[str, str]:
    """Environment for a child process: one OpenMP thread, loopback without a proxy, no model hub.

    With default threads the processes of one server fight for the cores: the same run took forty times longer.
    """
    env = dict(os.environ)
    env.update(
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",
        no_proxy="*",
        PYTHONUNBUFFERED="1",
    )
    env.update(extra)
    return env


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago.

    A server binds it half a minute later. So it is none that the kernel hands out to whoever asks for any, as other
    servers' processes do by the dozen meanwhile: one that finds its port taken stays up and mute.
    """
    while True:
        port = random.SystemRandom().randrange(*_FIXED_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass
class Reply:
    """Status and body of one HTTP exchange; ``json()`` parses the body. 4xx and 5xx do not raise."""

    status: int
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


@dataclass
class LiveServer:
    """A running server. ``url`` has no trailing slash; ``log`` is the file with stdout and stderr."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    flags: tuple[str, ...] = ()
    boot_seconds: float = 0.0
    _opener: urllib.request.OpenerDirector = field(
        default_factory=lambda: urllib.request.build_opener(urllib.request.ProxyHandler({}))
    )

    def request(self, method: str, path: str, payload: Any = None, *, timeout: float = 120.0) -> Reply:
        """One HTTP exchange; a status of 400 and more comes back as a Reply, a dead server raises."""
        data = None if payload is None else json.dumps(payload).encode()
        request = urllib.request.Request(
            self.url + path, data=data, method=method, headers={"Content-Type": "application/json"}
        )
        try:
            with self._opener.open(request, timeout=timeout) as answer:
                return Reply(answer.status, answer.read().decode())
        except urllib.error.HTTPError as refusal:
            return Reply(refusal.code, refusal.read().decode(errors="replace"))

    def get(self, path: str, *, timeout: float = 120.0) -> Reply:
        return self.request("GET", path, timeout=timeout)

    def post(self, path: str, payload: Any = None, *, timeout: float = 120.0) -> Reply:
        return self.request("POST", path, {} if payload is None else payload, timeout=timeout)

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        lora_path: str | Sequence[str | None] | None = None,
        max_new_tokens: int = 16,
        sampling: dict[str, Any] | None = None,
        timeout: float = 120.0,
        **extra: Any,
    ) -> Any:
        """Greedy ``/generate`` (one dict, or a list for a list of prompts); raises on any status but 200.

        The answer's ``output_ids`` are the generated token ids, ``meta_info`` has ``cached_tokens``.
        """
        payload: dict[str, Any] = {
            "sampling_params": {
                "temperature": 0.0,
                "max_new_tokens": max_new_tokens,
                "ignore_eos": True,
                **(sampling or {}),
            },
            **extra,
        }
        if prompt is not None:
            payload["text"] = prompt if isinstance(prompt, str) else list(prompt)
        if input_ids is not None:
            payload["input_ids"] = [i if isinstance(i, int) else list(i) for i in input_ids]
        if lora_path is not None:
            payload["lora_path"] = lora_path if isinstance(lora_path, str) else list(lora_path)
        reply = self.post("/generate", payload, timeout=timeout)
        if reply.status != 200:
            raise RuntimeError(f"/generate answered {reply.status}: {reply.text[:2000]}")
        return reply.json()

    def alive(self) -> bool:
        return self.process.poll() is None

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def tail(self, lines: int = LOG_TAIL) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    def stop(self) -> None:
        """Kill the server and all it started, at once. Safe to call twice."""
        kill_group(self.process)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the process group that ``process`` leads (it was started with its own session)."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=20)


def start(
    argv: Sequence[str], *, log: Path, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start ``argv`` in a session of its own with output to ``log``; it dies with this process.

    Output goes to a file: a server's children would keep a pipe open after its death.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as sink:
        process = subprocess.Popen(
            list(argv),
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=clean_env() if env is None else env,
            cwd=cwd,
            start_new_session=True,
        )
    atexit.register(kill_group, process)
    _started.append(process)
    return process


def end_with(status: int) -> None:
    """Kill everything this process started and end it at once, whatever it is doing. For signal handlers.

    An exception would not do: an event loop or a thread pool keeps it until their work is over.
    """
    for process in _started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    os._exit(status)


def run(
    argv: Sequence[str], *, log: Path, timeout: float, env: dict[str, str] | None = None
) -> tuple[int, str]:
    """Run a command to its end; return its status and output. Past ``timeout`` its group is killed (status 124)."""
    process = start(argv, log=log, env=env)
    try:
        status = process.wait(timeout=timeout)
    except subprocess.TimeoutExpired:
        status = 124
    finally:
        kill_group(process)
    return status, log.read_text(errors="replace")


@contextlib.contextmanager
def server(
    model: Path | str,
    *flags: str,
    log_dir: Path,
    name: str = "server",
    env: dict[str, str] | None = None,
    boot_timeout: float = 300.0,
    module: str = "sglang.launch_server",
) -> Iterator[LiveServer]:
    """``python -m MODULE`` with ``flags`` added; ready to answer when the block begins.

    Raises RuntimeError with the end of the log when the server dies or is not healthy in ``boot_timeout`` s.
    """
    port = free_port()
    log = log_dir / f"{name}.log"
    argv = [sys.executable, "-m", module, "--model-path", str(model), "--device", "cpu"]
    argv += ["--host", "127.0.0.1", "--port", str(port), *flags]
    began = time.monotonic()
    process = start(argv, log=log, env=env)
    live = LiveServer(process, f"http://127.0.0.1:{port}", log, tuple(flags))
    try:
        wait_ready(live, boot_timeout)
        live.boot_seconds = time.monotonic() - began
        yield live
    finally:
        live.stop()


def wait_ready(live: LiveServer, timeout: float) -> None:
    """Wait for ``/health`` to answer 200; RuntimeError with the log's end if the server dies or stays mute."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        if not live.alive():
            raise RuntimeError(
                f"the server ended with {live.process.returncode}; flags {live.flags}; log {live.log}:\n{live.tail()}"
            )
        with contextlib.suppress(OSError):
            if live.get("/health", timeout=10).status == 200:
                return
        time.sleep(0.3)
    raise RuntimeError(
        f"no healthy server in {timeout:.0f} s; flags {live.flags}; log {live.log}:\n{live.tail()}"
    )


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
