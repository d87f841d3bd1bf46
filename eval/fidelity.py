"""``python -m elora_sglang.eval fidelity``: how far the simulator is from live servers.

Stock SGLang, HiCache and ELORA each serve one workload. Each server is calibrated first, on prompts of the
calibration's own, and the simulator then predicts the workload from that profile: hit rates, TTFT. Beside it, what each
server's cache was asked, in the order it was asked, is asked again of the simulator's tree, and every answer is
compared: given the order of events, hits must be the same to the token.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from elora_sglang.core import trace
from elora_sglang.eval import calibrate
from elora_sglang.eval.baselines.record import ENV_RECORD
from elora_sglang.eval.serving import model, player, scaled, systems
from elora_sglang.eval.serving.ground import GPU, Ground
from elora_sglang.eval.sim import machine as machines
from elora_sglang.eval.sim import recorded
from elora_sglang.eval.sim import systems as simulated
from elora_sglang.eval.sim.machine import Machine
from elora_sglang.eval.sim.run import simulate
from elora_sglang.eval.support import reporting
from elora_sglang.eval.support.state import State
from elora_sglang.eval.workloads.model import Workload

#: Live systems and what simulates them: HiCache is started without overlapped adapter loading, as `live` does.
SYSTEMS = {"stock": "stock", "hicache": "vllm-offload", "elora": "elora"}
#: Relative error of the mean TTFT that is aimed for.
AIM = 0.10
WARMUP = 0.3


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to ``python -m elora_sglang.eval``."""
    parser = subparsers.add_parser("fidelity", help="the simulator beside live servers")
    add = parser.add_argument
    add("--workload", choices=scaled.names(), default="chat", help="traffic (default %(default)s)")
    add("--rate", type=float, default=2.0, help="turns a second (default %(default)s)")
    add("--seconds", type=float, default=90.0, help="of sessions that begin (default %(default)s)")
    add("--adapters", type=int, default=12, help="(default %(default)s)")
    add("--device-tokens", type=int, default=10240, help="memory in KV tokens (default %(default)s)")
    add("--host-tokens", type=int, help="(default 3 times the device's)")
    add("--running", type=int, default=8, help="requests running at once (default %(default)s)")
    add(
        "--state",
        type=Path,
        default=Path(".eval-fidelity"),
        help="folder of finished cells (default %(default)s)",
    )
    add("--model", type=Path, help="folder of the evaluation model (default: model/ in --state)")
    add("--link-gbps", default="auto", help="emulated link, GB/s each way (default: as `live`)")
    add("--profile", default=GPU, help="GPU profile of the link (default %(default)s)")
    add("--seed", type=int, default=1)
    reporting.add_arguments(parser)
    parser.set_defaults(run=run)


@dataclass
class Fidelity:
    """One run over all systems."""

    ground: Ground
    workload: Workload
    label: str
    seconds: float

    def live(self, name: str) -> dict[str, Any]:
        """Profile, answers and recorded order of one server, from disk or measured now."""
        found: dict[str, Any] = self.ground.state.cell(
            ("fidelity", name, self.label), lambda: self._measure(name)
        )
        return found

    def _measure(self, name: str) -> dict[str, Any]:
        ground = self.ground
        record = ground.state.folder / f"order-{name}.jsonl"
        system = self._recording(ground.make(name), record)
        running = ground.running(system)
        running.go()
        try:
            machine = self._calibrated(running.live.url, name)
            running.flush()
            begin = _lines(record)
            turns = sum(len(session.turns) for session in self.workload.sessions())
            with tqdm(total=turns, unit="turn", desc=name, leave=False) as bar:
                records = player.play(
                    running.live.url,
                    self.workload,
                    scaled.adapter_names(ground.budget.adapters),
                    vocab=ground.vocab,
                    told=lambda answered: bar.update(),
                )
        finally:
            ground.fleet.drop([system.key])
        return {
            "setting": system.setting,
            "machine": dataclasses.asdict(machine),
            "summary": player.summary(records, player.due(self.workload), WARMUP * self.seconds),
            "order": order(name, record, begin),
        }

    def _recording(self, system: systems.System, record: Path) -> systems.System:
        if system.name in systems.STOCK:
            return dataclasses.replace(system, env={**system.env, ENV_RECORD: str(record)})
        return dataclasses.replace(system, flags=("--elora-trace-out", str(record), *system.flags))

    def _calibrated(self, url: str, name: str) -> Machine:
        budget = self.ground.budget
        target = calibrate.Target(url, seed=7)
        asked = argparse.Namespace(
            name=f"{name} on this machine",
            device_tokens=budget.device_tokens,
            host_tokens=budget.host_tokens,
            link_gbps=self.ground.link_gbps,
            disk_gbps=1.0,
        )
        machine = calibrate.profile(target, calibrate.fit(target.measure()), asked)
        if name not in systems.STOCK:
            return machine
        size = statistics.fmean(model.adapter_bytes(rank) for _, rank in target.adapters)
        link_s = size / (self.ground.link_gbps * 1e9)
        return dataclasses.replace(machine, slot_load_s=max(target.switch_s() - link_s, 0.0))

    def predicted(self, name: str, live: dict[str, Any]) -> dict[str, Any]:
        """What the simulator says of the same workload, from the server's profile."""
        budget = self.ground.budget
        system = simulated.systems()[SYSTEMS[name]]
        knobs: dict[str, Any] = {"slots": int(live["setting"])} if system.knob == "slots" else {}
        return simulate(
            self.workload,
            system,
            Machine(**live["machine"]),
            block_tokens=1,
            device_slots=budget.device_tokens,
            host_slots=budget.host_tokens,
            warmup_s=WARMUP * self.seconds,
            **knobs,
        ).figures


def _lines(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open(encoding="utf-8") as lines:
        return sum(1 for _ in lines)


def order(name: str, record: Path, begin: int) -> dict[str, Any]:
    """The recorded order of events, replayed: tokens found as recorded and as replayed, and the first difference.

    ``begin``: lines that the calibration wrote; all are replayed, for the state they leave.
    """
    with record.open(encoding="utf-8") as lines:
        if name in systems.STOCK:
            return asdict(recorded.replay(lines)) | {"calibration": begin}
        found = trace.replay(lines, players=1)
    matches, device, host = 0, 0, 0
    with record.open(encoding="utf-8") as lines:
        for line in lines:
            event = json.loads(line)
            if isinstance(event, list) and event[0] == "match":
                matches, device, host = matches + 1, device + event[3][1], host + event[3][3]
    # The replay compares every answer, so without a difference the same tokens were found.
    same = [device, host] if found.mismatch is None else [0, 0]
    return {
        "events": found.events,
        "matches": matches,
        "recorded": [device, host],
        "replayed": same,
        "difference": found.mismatch,
        "calibration": begin,
    }


def run(args: argparse.Namespace) -> int:
    """Serve, simulate, compare; returns the exit status."""
    budget = systems.Budget(
        args.device_tokens,
        args.host_tokens or 3 * args.device_tokens,
        args.running,
        args.adapters,
        model.RANKS,
    )
    state = State(args.state.absolute())
    folder = (args.model or state.folder / "model").absolute()
    ground = Ground("fidelity", folder, state, budget, args.link_gbps, machines.load(args.profile))
    work = scaled.workload(
        args.workload,
        rate=args.rate,
        duration_s=args.seconds,
        adapters=args.adapters,
        ranks=model.RANKS,
        seed=args.seed,
    )
    found: dict[str, Any] = {}
    try:
        ground.prepare()
        label = f"{args.workload}/{args.rate:g}/{args.seconds:g}/{args.seed}/{asdict(budget)}/{ground.link_gbps:.4f}"
        study = Fidelity(ground, work, label, args.seconds)
        for name in SYSTEMS:
            live = study.live(name)
            found[name] = {"live": live, "predicted": study.predicted(name, live)}
            reporting.progress(f"{name}: {live['order']['events']} events replayed")
    except (RuntimeError, ValueError, OSError) as error:
        raise SystemExit(f"fidelity: {error}") from error
    finally:
        ground.fleet.end()
    tables = [
        reporting.Table(f"{args.workload}: predicted from the workload alone", PREDICTED, predictions(found)),
        reporting.Table("Hits, given the recorded order of events", ORDERED, orders(found)),
    ]
    return reporting.finish(
        args, tables, aims(found),
        {
            "title": "The simulator beside live servers",
            "fidelity": found, "budget": asdict(budget), "link_gbps": ground.link_gbps,
            "workload": {"name": args.workload, "rate": args.rate, "seconds": args.seconds, "seed": args.seed},
        },
    )  # fmt: skip


PREDICTED = (
    "system", "requests", "TTFT live ms", "predicted", "error", "P99 live", "predicted", "TPOT live", "predicted",
    "KV dev % live", "predicted", "host % live", "predicted",
)  # fmt: skip
ORDERED = ("system", "events", "matches", "tokens found, recorded", "replayed", "first difference")


def error(values: dict[str, Any]) -> float:
    """Of the predicted mean TTFT, relative to the live one."""
    live = float(values["live"]["summary"]["ttft"]["mean"])
    return float(values["predicted"]["ttft"]["mean"]) / live - 1.0


def predictions(found: dict[str, Any]) -> list[list[object]]:
    """Rows under :data:`PREDICTED`."""
    rows: list[list[object]] = []
    for name, values in found.items():
        live, said = values["live"]["summary"], values["predicted"]
        rows.append([
            name, live["requests"],
            f"{1000 * live['ttft']['mean']:.1f}", f"{1000 * said['ttft']['mean']:.1f}", f"{100 * error(values):+.1f} %",
            f"{1000 * live['ttft']['p99']:.0f}", f"{1000 * said['ttft']['p99']:.0f}",
            f"{1000 * live['tpot']['mean']:.1f}", f"{1000 * said['tpot']['mean']:.1f}",
            *(
                f"{100 * one['kv_hits'][tier]:.1f}"
                for tier in ("device", "host")
                for one in (live, said)
            ),
        ])  # fmt: skip
    return rows


def orders(found: dict[str, Any]) -> list[list[object]]:
    """Rows under :data:`ORDERED`."""
    rows: list[list[object]] = []
    for name, values in found.items():
        one = values["live"]["order"]
        rows.append([
            name, f"{one['events']:,}", f"{one['matches']:,}",
            " + ".join(f"{tokens:,}" for tokens in one["recorded"]),
            " + ".join(f"{tokens:,}" for tokens in one["replayed"]),
            one["difference"] or "none",
        ])  # fmt: skip
    return rows


def aims(found: dict[str, Any]) -> list[reporting.Aim]:
    """Mean TTFT within 10 %, and not one token found otherwise."""
    checks = []
    for name, values in found.items():
        off = abs(error(values))
        checks.append(reporting.Aim(f"{name}: error of the mean TTFT", off, f"<= {AIM:g}", off <= AIM))
        one = values["live"]["order"]
        same = one["difference"] is None and list(one["recorded"]) == list(one["replayed"])
        checks.append(reporting.Aim(f"{name}: hits as recorded", float(same), "1", same))
    return checks
