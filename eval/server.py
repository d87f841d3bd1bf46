"""Real SGLang servers for measurements and tests: one process group each, on a free loopback port, killed for certain.

    with server(model, *flags, log_dir=tmp) as live:   # python -m sglang.launch_server ...
        live.generate("Hello", lora_path="sql", max_new_tokens=8)["text"]

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_started: list[subprocess.Popen[bytes]] = []

#: Below those that Linux and others hand out.
_FIXED_PORTS = (20_000, 32_000)

#: Loopback, whatever proxy the environment names.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

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
class Api:
    """A server by its address; ``url`` has no trailing slash."""

    url: str

    def request(self, method: str, path: str, payload: Any = None, *, timeout: float = 120.0) -> Reply:
        """One HTTP exchange; a status of 400 and more comes back as a Reply, a dead server raises."""
        data = None if payload is None else json.dumps(payload).encode()
        request = urllib.request.Request(
            self.url + path, data=data, method=method, headers={"Content-Type": "application/json"}
        )
        try:
            with _opener.open(request, timeout=timeout) as answer:
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
        params = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "ignore_eos": True} | (sampling or {})
        asked = {"text": prompt, "input_ids": input_ids, "lora_path": lora_path, "sampling_params": params}
        payload = {key: value for key, value in asked.items() if value is not None} | extra
        reply = self.post("/generate", payload, timeout=timeout)
        if reply.status != 200:
            raise RuntimeError(f"/generate answered {reply.status}: {reply.text[:2000]}")
        return reply.json()

    def flush(self) -> None:
        """Empty its caches; waits until it is idle. Raises RuntimeError when it never is."""
        for _ in range(100):
            if self.post("/flush_cache").status == 200:
                return
            time.sleep(0.2)
        raise RuntimeError(f"{self.url}: the caches could not be flushed: it serves somebody")


class LiveServer(Api):
    """A running server in a process group of its own; ``log`` is the file with stdout and stderr."""

    def __init__(
        self, process: subprocess.Popen[bytes], url: str, log: Path, flags: tuple[str, ...] = ()
    ) -> None:
        super().__init__(url)
        self.process, self.log, self.flags = process, log, flags

    def alive(self) -> bool:
        return self.process.poll() is None

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def tail(self, lines: int = LOG_TAIL) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    def pause(self) -> None:
        """Stop it until :meth:`awake`: SGLang's scheduler spins when it is idle."""
        with contextlib.suppress(ProcessLookupError):  # it died; whoever asks it next is told
            os.killpg(self.process.pid, signal.SIGSTOP)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """It runs inside the block, and is stopped after it."""
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            self.pause()

    def stop(self) -> None:
        """Kill the server and all it started, at once. Safe to call twice."""
        kill_group(self.process)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the process group that ``process`` leads (it was started with its own session)."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=20)


def start(argv: Sequence[str], *, log: Path, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
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
    live = launch(model, flags, log_dir / f"{name}.log", env, module=module)
    try:
        wait_ready(live, boot_timeout)
        yield live
    finally:
        live.stop()


def launch(
    model: Path | str,
    flags: Sequence[str],
    log: Path,
    env: dict[str, str] | None = None,
    device: str | None = "cpu",
    module: str = "sglang.launch_server",
) -> LiveServer:
    """Start ``python -m MODULE`` on a free port; see :func:`wait_ready`."""
    port = free_port()
    argv = [sys.executable, "-m", module, "--model-path", str(model)]
    argv += [*(("--device", device) if device else ()), "--host", "127.0.0.1", "--port", str(port), *flags]
    return LiveServer(start(argv, log=log, env=env), f"http://127.0.0.1:{port}", log, tuple(flags))


def wait_ready(live: LiveServer, timeout: float) -> None:
    """Wait for ``/health`` to answer 200; RuntimeError with the log's end if the server dies or stays mute."""
    until = time.monotonic() + timeout
    while live.alive() and time.monotonic() < until:
        with contextlib.suppress(OSError):
            if live.get("/health", timeout=10).status == 200:
                return
        time.sleep(0.3)
    why = f"no healthy server in {timeout:.0f} s"
    if not live.alive():
        why = f"the server ended with {live.process.returncode}"
    raise RuntimeError(f"{why}; flags {live.flags}; log {live.log}:\n{live.tail()}")
