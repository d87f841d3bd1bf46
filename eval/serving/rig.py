"""Where live runs take place: the evaluation model on disk, the emulated link, and the servers that share both."""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from elora_sglang.eval import server
from elora_sglang.eval.serving import evaluation_model as model
from elora_sglang.eval.serving import launch, paper_traffic, player
from elora_sglang.eval.sim import machine
from elora_sglang.eval.support import arguments
from elora_sglang.eval.support.reporting import progress
from elora_sglang.eval.support.state import State
from elora_sglang.eval.workloads.model import Workload

BOOTS_AT_ONCE = 2
BOOT_S = 600.0
PROBE_TOKENS, PROBES = 1024, 5
DEFAULT_PROFILE = "h200-llama-8b"


def add_arguments(parser: argparse.ArgumentParser, state: str, device_default: str) -> None:
    """Add what every rig is asked for, besides ``--adapters``; with the defaults of folder and memory."""
    add, memory = parser.add_argument, f"device memory in KV tokens (default {device_default})"
    add("--device-tokens", type=arguments.count, help=memory)
    add("--host-tokens", type=arguments.count, help="host memory in KV tokens (default 3 times the device's)")
    add("--running", type=arguments.count, default=8, help="requests at once (default %(default)s)")
    add("--state", type=Path, default=Path(state), help="folder of finished cells (default %(default)s)")
    add("--model", type=Path, help="folder of the evaluation model (default: model/ in --state)")
    auto = "emulated link, GB/s each way; auto: the profile's link-to-compute ratio; 0: none (default auto)"
    add("--link-gbps", default="auto", help=auto)
    add("--profile", default=DEFAULT_PROFILE, help="machine profile by name or file (default %(default)s)")
    add("--seed", type=int, default=1)


class Rig:
    """Model, adapters, link and servers of one run: a context manager.

    On entry the model is written where it is missing, and the link is settled; on exit all servers are ended. At most
    one server is not stopped while something is measured.

    Args:
        args: of :func:`add_arguments`.
        device_tokens: where ``args`` do not say.
        adapters, ranks: of the traffic; ``adapters`` where they are not the arguments'.

    Attributes:
        budget: memory and adapters.
        state: cells of the run.
        vocab: size of the model's vocabulary.
        prefill_s: seconds to prefill one token on this machine.
        link_gbps: of the emulated link; 0: none.
        servers: those that were started, by :attr:`.launch.System.key`.

    Raises MachineError for a profile that cannot be read.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        device_tokens: int,
        adapters: int | None = None,
        ranks: tuple[int, ...] = model.RANKS,
    ) -> None:
        device = args.device_tokens or device_tokens
        host = args.host_tokens or 3 * device
        self.budget = launch.Budget(device, host, args.running, adapters or args.adapters, ranks)
        self.state = State(args.state.absolute())
        self.folder = (args.model or self.state.folder / "model").absolute()
        self.profile = machine.load(args.profile)
        self._link: str = args.link_gbps
        self.vocab, self.prefill_s, self.link_gbps = 0, 0.0, 0.0
        self.servers: dict[str, server.LiveServer] = {}

    def about(self) -> dict[str, Any]:
        """What a result says of it."""
        return {
            "budget": asdict(self.budget),
            "link_gbps": self.link_gbps,
            "prefill_s_per_token": self.prefill_s,
            "profile": asdict(self.profile),
        }

    def __enter__(self) -> Self:
        """Raises RuntimeError where the model cannot be written, or the probe cannot be started."""
        # Ended from outside, the command still takes its servers with it.
        signal.signal(signal.SIGTERM, lambda *_: server.end_with(143))
        budget = self.budget
        if not model.complete(self.folder, budget.adapters, budget.ranks):
            progress(f"writing the model and {budget.adapters} adapters to {self.folder}")
            command = [sys.executable, "-m", "elora_sglang.eval.serving.evaluation_model", str(self.folder)]
            status, text = server.run(
                [*command, str(budget.adapters), ",".join(map(str, budget.ranks))],
                log=self.state.folder / "model.log",
                timeout=900,
            )
            if status != 0:
                raise RuntimeError(f"the model could not be written:\n{text[-2000:]}")
        self.vocab = json.loads((self.folder / "base" / "config.json").read_text())["vocab_size"]
        cell = self.state.cell(("prefill", budget.device_tokens), self._probe)
        self.prefill_s = float(cell["prefill_s_per_token"])
        if self._link == "auto":
            self.link_gbps = self.profile.link_for(model.KV_BYTES_PER_TOKEN, self.prefill_s)
        else:
            self.link_gbps = float(self._link)
        return self

    def __exit__(self, *error: object) -> None:
        self.keep([])

    def _probe(self) -> dict[str, Any]:
        """Median seconds to prefill one token of a prompt that is in no cache; without a link."""
        progress("measuring what a token's prefill costs on this machine")
        stock, taken = self.candidates("stock", quick=False)[0], []
        with self.server(stock).awake():
            for number in range(PROBES + 1):
                ids = player.words(player.Piece(-number, PROBE_TOKENS), self.vocab)
                began = time.perf_counter()
                self.servers[stock.key].generate(input_ids=ids, lora_path=model.names(1)[0], max_new_tokens=1)
                taken.append(time.perf_counter() - began)
        self.keep([])
        return {"prefill_s_per_token": statistics.median(taken[1:]) / PROBE_TOKENS}

    def workload(self, name: str, **parameters: Any) -> Workload:
        """One of the paper's, in the size of the model; see :func:`.paper_traffic.workload`."""
        ranks, adapters = self.budget.ranks, self.budget.adapters
        return paper_traffic.workload(name, ranks=ranks, adapters=adapters, **parameters)

    def system(self, name: str, setting: float | None = None, without: Sequence[str] = ()) -> launch.System:
        """A system of this rig. Raises ValueError for a setting that does not fit."""
        return launch.system(name, setting, self.budget, self.folder, self.link_gbps, without)

    def candidates(self, name: str, *, quick: bool) -> list[launch.System]:
        """A system with each setting that tuning tries; one where there is nothing to set."""
        settings = launch.candidates(name, self.budget, quick=quick) or (None,)
        return [self.system(name, setting) for setting in settings]

    def best(
        self, candidates: Sequence[launch.System], mean_ttft: Callable[[launch.System], float]
    ) -> launch.System:
        """The candidate with the lowest mean TTFT (seconds); the others' servers are ended. One is not measured."""
        if len(candidates) == 1:
            return candidates[0]
        times = [mean_ttft(one) for one in candidates]
        chosen = candidates[times.index(min(times))]
        for one in candidates:
            if one is not chosen and one.key in self.servers:
                self.servers.pop(one.key).stop()
        return chosen

    # --- servers --------------------------------------------------------------------------------------------------

    def _start(self, system: launch.System) -> server.LiveServer:
        """Start a server, register its late adapters, check its hooks, stop it."""
        log = self.state.folder / "logs" / f"{system.key}.log"
        env = server.clean_env(**system.env)
        live = server.launch(self.folder / "base", system.flags, log, env, module=system.module)
        try:
            server.wait_ready(live, BOOT_S)
            for entry in system.late_adapters:
                name, _, path = entry.partition("=")
                reply = live.post("/load_lora_adapter", {"lora_name": name, "lora_path": path})
                if reply.status != 200:
                    raise RuntimeError(f"{name} could not be loaded: {reply.text[:300]}")
            launch.require_hooks(system, live.get("/server_info").json(), self.budget, self.link_gbps)
            live.pause()
        except BaseException as error:
            live.stop()
            if isinstance(error, RuntimeError):
                last = str(error).strip().splitlines()[-1]
                raise RuntimeError(f"{system.key} cannot be measured: {last} (log: {log})") from None
            raise
        return live

    def want(self, systems: Sequence[launch.System]) -> None:
        """Start those that are not there yet, two at a time; stopped afterwards."""
        new = [system for system in systems if system.key not in self.servers]
        if not new:
            return
        progress(f"starting {', '.join(system.key for system in new)}")
        with ThreadPoolExecutor(BOOTS_AT_ONCE) as pool:
            futures = {system.key: pool.submit(self._start, system) for system in new}
        self.servers |= {key: one.result() for key, one in futures.items() if one.exception() is None}
        for future in futures.values():
            future.result()  # raises what went wrong

    def server(self, system: launch.System) -> server.LiveServer:
        """The server of a system, started where it is not yet there; stopped."""
        self.want([system])
        return self.servers[system.key]

    def keep(self, systems: Sequence[launch.System]) -> None:
        """End all other servers."""
        for key in set(self.servers) - {system.key for system in systems}:
            self.servers.pop(key).stop()

    # --- measuring ------------------------------------------------------------------------------------------------

    def measure(
        self, system: launch.System, lanes: player.Lanes, steps: Sequence[player.Step], **options: Any
    ) -> list[dict[str, Any]]:
        """One cell a step: the caches emptied, the traffic served, the figures; the server is stopped again.

        Counted is what was sent in a step's measured time. ``options``: see :func:`.player.serve`.
        """
        live = self.server(system)
        samples: list[tuple[float, float]] = []

        def counters() -> dict[str, float]:
            return counters_of(live.get("/server_info").json())

        def sample() -> None:
            now = counters()
            held = now["elora.evictable_slots"] + now["elora.protected_slots"]
            samples.append((time.perf_counter(), now["elora.invalid_kv_slots"] / held if held else 0.0))

        with live.awake():
            live.flush()
            began = time.perf_counter()
            served = player.serve(
                live.url,
                lanes,
                model.names(self.budget.adapters),
                vocab=self.vocab,
                steps=steps,
                hints=system.name.endswith("+hints"),
                snapshot=counters,
                sample=None if system.name in launch.STOCK else sample,
                **options,
            )
        cells = []
        for step, begin, (before, after) in zip(steps, served.begins, served.snapshots, strict=True):
            end = begin + step.seconds
            answers = [one for one in served.answers if begin <= one.sent < end]
            invalid = [share for when, share in samples if begin <= when - began < end]
            wasted = {"invalid_kv": statistics.fmean(invalid)} if invalid else {}
            cells.append({
                "system": system.key, "rate_asked": step.rate,
                "summary": player.summary(answers, step.seconds) | wasted,
                "counters": {key: value - before.get(key, 0.0) for key, value in after.items()},
                "answers": {one.key: one.output_ids for one in answers},
                "ttft": [one.ttft for one in answers],
            })  # fmt: skip
        return cells


def counters_of(info: dict[str, Any]) -> dict[str, float]:
    """Counters of one ``/server_info``: bytes moved and adapters loaded of a baseline, all numbers of ELORA's."""
    state = info["internal_states"][0]
    found: dict[str, float] = {}
    if baseline := state.get("baseline"):
        found |= {f"moved_{direction}": size for direction, size in baseline["moved_bytes"].items()}
        found["adapter_loads"] = baseline["adapter_loads"]

    def collect(prefix: str, tree: dict[str, Any]) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                collect(f"{prefix}.{key}", value)
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                found[f"{prefix}.{key}"] = float(value)

    collect("elora", state.get("elora") or {})
    return found
