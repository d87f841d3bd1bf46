"""Servers of a comparison: start, stop and continue, register, flush, measure; and cells on disk."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elora_sglang.eval import reporting, server
from elora_sglang.eval.serving import drive, model
from elora_sglang.eval.serving import statistics as figures
from elora_sglang.eval.serving.chat import Workload
from elora_sglang.eval.serving.systems import STOCK, Budget, System, require_hooks

BOOTS_AT_ONCE = 2
SETTLE, QUICK_SETTLE = 3.0, 1.5  # seconds after a change of the rate that are not measured


@dataclass
class Running:
    """A started server and the way to end it."""

    system: System
    live: server.LiveServer
    _context: AbstractContextManager[server.LiveServer]

    def go(self) -> None:
        """Let it run."""
        os.killpg(self.live.process.pid, signal.SIGCONT)

    def halt(self) -> None:
        """Stop it until :meth:`go`: SGLang's scheduler spins when it is idle."""
        os.killpg(self.live.process.pid, signal.SIGSTOP)

    def end(self) -> None:
        """Kill it."""
        self._context.__exit__(None, None, None)

    def info(self) -> dict[str, Any]:
        """Its ``/server_info``."""
        return dict(self.live.get("/server_info").json())

    def flush(self) -> None:
        """Empty its caches; waits until it is idle. Raises RuntimeError when it never is."""
        for _ in range(100):
            if self.live.post("/flush_cache").status == 200:
                return
            time.sleep(0.2)
        raise RuntimeError(f"{self.system.key}: the caches could not be flushed")


def start(
    system: System, folder: Path, log_dir: Path, budget: Budget, link_gbps: float, patience: float = 600
) -> Running:
    """Start a server, register its late adapters, check its hooks; it is left running."""
    context = server.server(
        folder / "base",
        *system.flags,
        log_dir=log_dir,
        name=system.key,
        env=server.clean_env(**system.env),
        module=system.module,
        boot_timeout=patience,
    )
    try:
        live = context.__enter__()
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1]
        raise RuntimeError(f"{system.key} did not start: {last} (log: {log_dir / system.key}.log)") from None
    running = Running(system, live, context)
    try:
        for entry in system.late_adapters:
            name, _, path = entry.partition("=")
            reply = live.post("/load_lora_adapter", {"lora_name": name, "lora_path": path})
            if reply.status != 200:
                raise RuntimeError(f"{system.key}: {name} could not be loaded: {reply.text[:300]}")
        require_hooks(system, running.info(), budget, link_gbps)
    except BaseException:
        running.end()
        raise
    return running


@dataclass
class Fleet:
    """All servers of a run; at most one of them is not stopped while something is measured."""

    folder: Path
    log_dir: Path
    budget: Budget
    link_gbps: float
    servers: dict[str, Running] = field(default_factory=dict)

    def want(self, systems: Sequence[System]) -> None:
        """Start those that are not there yet, two at a time; stopped afterwards."""
        new = [system for system in systems if system.key not in self.servers]
        if not new:
            return
        reporting.progress(f"starting {', '.join(system.key for system in new)}")
        with ThreadPoolExecutor(BOOTS_AT_ONCE) as pool:
            futures = [
                pool.submit(start, s, self.folder, self.log_dir, self.budget, self.link_gbps) for s in new
            ]
            problem: BaseException | None = None
            for future in futures:
                try:
                    running = future.result()
                    running.halt()
                    self.servers[running.system.key] = running
                except BaseException as error:
                    problem = error
        if problem is not None:
            raise problem

    def drop(self, keys: Sequence[str]) -> None:
        """End servers that are not needed any more."""
        for key in keys:
            running = self.servers.pop(key, None)
            if running is not None:
                running.end()

    def keep(self, keys: Sequence[str]) -> None:
        """End all others."""
        self.drop([key for key in self.servers if key not in keys])

    def end(self) -> None:
        """End all."""
        self.drop(list(self.servers))


def residency(info: dict[str, Any]) -> dict[str, float]:
    """Counters of one ``/server_info``: bytes moved, invalid KV where ELORA reports it."""
    state = info["internal_states"][0]
    found: dict[str, float] = {}
    baseline = state.get("baseline")
    if baseline:
        found["moved_load"] = baseline["moved_bytes"]["load"]
        found["moved_save"] = baseline["moved_bytes"]["save"]
        found["adapter_loads"] = baseline["adapter_loads"]
    for name, value in _numbers(state.get("elora") or {}):
        found[f"elora.{name}"] = value
    return found


def _numbers(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((prefix + key, float(value)))
    return found


def measure(
    running: Running,
    workload: Workload,
    *,
    steps: Sequence[drive.Step],
    spread: float,
    seed: str,
    vocab: int,
    repeat: int = 0,
    settle: float = SETTLE,
) -> list[dict[str, Any]]:
    """One cell a step: the caches emptied, the traffic served, the figures; the server is stopped again.

    Counted is what was sent in a step's measured time.
    """
    running.go()
    samples: list[tuple[float, float]] = []
    try:
        running.flush()

        def sample() -> None:
            now = residency(running.info())
            if "elora.invalid_kv_slots" in now:
                held = now["elora.evictable_slots"] + now["elora.protected_slots"]
                samples.append((time.perf_counter(), now["elora.invalid_kv_slots"] / held if held else 0.0))

        began = time.perf_counter()
        served = drive.chat(
            running.live.url,
            workload,
            [model.name(i) for i in range(workload.adapters)],
            steps=steps,
            spread=spread,
            settle=settle,
            seed=seed,
            vocab=vocab,
            hints=running.system.name.endswith("+hints"),
            snapshot=lambda: residency(running.info()),
            sample=None if running.system.name in STOCK else sample,
        )
    finally:
        running.halt()
    cells = []
    for step, begin, (before, after) in zip(steps, served.begins, served.snapshots, strict=True):
        end = begin + step.seconds
        records = [record for record in served.records if begin <= record.sent < end]
        invalid = [share for when, share in samples if begin <= when - began < end]
        cells.append(
            {
                "system": running.system.key,
                "repeat": repeat,
                "rate_asked": step.rate,
                "summary": figures.summary(records, step.seconds)
                | ({"invalid_kv": statistics.fmean(invalid)} if invalid else {}),
                "counters": {key: value - before.get(key, 0.0) for key, value in after.items()},
                "answers": {record.key: record.output_ids for record in records},
                "ttft": [record.ttft for record in records],
            }
        )
    return cells


def prefill_seconds(running: Running, vocab: int, tokens: int = 1024, times: int = 5) -> float:
    """Median seconds to prefill one token of a prompt that is in no cache; the server is stopped again."""
    running.go()
    try:
        running.flush()
        taken = []
        for number in range(times + 1):
            ids = [5 + (17 * i + 31 * number + i * i % 97) % (vocab - 5) for i in range(tokens)]
            began = time.perf_counter()
            running.live.generate(input_ids=ids, lora_path=model.name(0), max_new_tokens=1)
            taken.append(time.perf_counter() - began)
        running.flush()
    finally:
        running.halt()
    return statistics.median(taken[1:]) / tokens
