"""``python -m elora_sglang.eval fidelity``: how far the simulator is from live servers.

Stock SGLang, HiCache and ELORA each serve one workload. Each server is calibrated first, on prompts of the
calibration's own, and the simulator then predicts the workload from that profile: hit rates, TTFT. Beside it, what each
server's cache was asked, in the order it was asked, is asked again of the simulator's tree, and every answer is
compared: given the order of events, hits must be the same to the token.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from elora_sglang.core import trace
from elora_sglang.eval import calibrate
from elora_sglang.eval.baselines.record import ENV_RECORD
from elora_sglang.eval.serving import evaluation_model as model
from elora_sglang.eval.serving import launch, paper_traffic, player
from elora_sglang.eval.serving.rates import WARMUP
from elora_sglang.eval.serving.rig import Rig
from elora_sglang.eval.serving.rig import add_arguments as add_rig
from elora_sglang.eval.sim import recorded
from elora_sglang.eval.sim import systems as simulated
from elora_sglang.eval.sim.machine import Machine
from elora_sglang.eval.sim.run import simulate
from elora_sglang.eval.support import arguments, reporting
from elora_sglang.eval.workloads.model import Workload

#: Live systems and what simulates them: HiCache is started without overlapped adapter loading, as `live` does.
SYSTEMS = {"stock": "stock", "hicache": "vllm-offload", "elora": "elora"}
#: Relative error of the mean TTFT that is aimed for.
AIM = 0.10


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to ``python -m elora_sglang.eval``."""
    parser = subparsers.add_parser("fidelity", help="the simulator beside live servers")
    add, positive = parser.add_argument, arguments.positive
    add("--workload", choices=list(paper_traffic.SCALED), default="chat", help="(default %(default)s)")
    add("--rate", type=positive, default=2.0, help="turns a second (default %(default)s)")
    add("--seconds", type=positive, default=90.0, help="of sessions that begin (default %(default)s)")
    add("--adapters", type=arguments.count, default=12, help="(default %(default)s)")
    add_rig(parser, ".eval-fidelity", "10240")
    reporting.add_arguments(parser)
    parser.set_defaults(run=run)


@dataclass
class Fidelity:
    """One run over all systems. ``label``: of its cells."""

    rig: Rig
    workload: Workload
    label: str
    seconds: float

    def live(self, name: str) -> dict[str, Any]:
        """Profile, answers and recorded order of one server, from disk or measured now."""
        key = ("fidelity", name, self.label)
        found: dict[str, Any] = self.rig.state.cell(key, lambda: self._measure(name))
        return found

    def _measure(self, name: str) -> dict[str, Any]:
        rig, record = self.rig, self.rig.state.folder / f"order-{name}.jsonl"
        system = self._recording(rig.system(name), record)
        live = rig.server(system)
        try:
            with live.awake():
                machine = self._calibrated(live.url, name)
                live.flush()
                begin = len(record.read_text(encoding="utf-8").splitlines()) if record.exists() else 0
                names = model.names(rig.budget.adapters)
                answers = player.play(live.url, self.workload, names, vocab=rig.vocab, bar=name)
        finally:
            rig.keep([])
        # As the simulator counts: a turn that follows an answer with its session's start.
        due = player.due(self.workload)
        counted = [one for one in answers if due[one.key] >= WARMUP * self.seconds]
        return {
            "setting": system.setting,
            "machine": asdict(machine),
            "summary": player.summary(counted, self.seconds),
            "order": order(name, record, begin),
        }

    def _recording(self, system: launch.System, record: Path) -> launch.System:
        record.unlink(missing_ok=True)
        if system.name in launch.STOCK:
            return replace(system, env={**system.env, ENV_RECORD: str(record)})
        return replace(system, flags=("--elora-trace-out", str(record), *system.flags))

    def _calibrated(self, url: str, name: str) -> Machine:
        budget, link_gbps = self.rig.budget, self.rig.link_gbps
        target = calibrate.Target(url, seed=7)
        machine = calibrate.profile(
            target, calibrate.fit(target.measure()), name=f"{name} on this machine", link_gbps=link_gbps, disk_gbps=1.0,
            device_tokens=budget.device_tokens, host_tokens=budget.host_tokens,
        )  # fmt: skip
        if name not in launch.STOCK:
            return machine
        size = statistics.fmean(model.adapter_bytes(rank) for _, rank in target.adapters)
        link_s = size / (link_gbps * 1e9)
        return replace(machine, slot_load_s=max(target.switch_s() - link_s, 0.0))

    def predicted(self, name: str, live: dict[str, Any]) -> dict[str, Any]:
        """What the simulator says of the same workload, from the server's profile."""
        budget, system = self.rig.budget, simulated.systems()[SYSTEMS[name]]
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


def order(name: str, record: Path, begin: int) -> dict[str, Any]:
    """The recorded order of events, replayed: tokens found as recorded and as replayed, and the first difference.

    ``begin``: lines that the calibration wrote; all are replayed, for the state they leave.
    """
    lines = record.read_text(encoding="utf-8").splitlines()
    if name in launch.STOCK:
        return asdict(recorded.replay(lines)) | {"calibration": begin}
    found = trace.replay(lines, players=1)
    matches = [one for one in map(json.loads, lines) if isinstance(one, list) and one[0] == "match"]
    tokens = [sum(one[3][1] for one in matches), sum(one[3][3] for one in matches)]
    return {
        "events": found.events,
        "matches": len(matches),
        "recorded": tokens,
        # The replay compares every answer, so without a difference the same tokens were found.
        "replayed": tokens if found.mismatch is None else [0, 0],
        "difference": found.mismatch,
        "calibration": begin,
    }


def run(args: argparse.Namespace) -> int:
    """Serve, simulate, compare; returns the exit status."""
    about = {"rate": args.rate, "seconds": args.seconds, "seed": args.seed}
    found: dict[str, Any] = {}
    try:
        with Rig(args, 10240) as rig:
            work = rig.workload(args.workload, rate=args.rate, duration_s=args.seconds, seed=args.seed)
            label = f"{args.workload}/{about}/{asdict(rig.budget)}/{rig.link_gbps:.4f}"
            study = Fidelity(rig, work, label, args.seconds)
            for name in SYSTEMS:
                live = study.live(name)
                found[name] = {"live": live, "predicted": study.predicted(name, live)}
                reporting.progress(f"{name}: {live['order']['events']} events replayed")
    except (RuntimeError, ValueError, OSError) as error:
        raise SystemExit(f"fidelity: {error}") from error
    what = f"{args.workload}: predicted from the workload alone"
    tables = [
        reporting.Table(what, PREDICTED, predictions(found), "fidelity-predicted"),
        reporting.Table("Hits, given the recorded order of events", ORDERED, orders(found), "fidelity-order"),
    ]
    data = {"title": "The simulator beside live servers", "fidelity": found}
    return reporting.finish(
        args, tables, aims(found), data | rig.about() | {"workload": {"name": args.workload, **about}}
    )


PREDICTED = (
    "system", "requests", "TTFT live ms", "predicted", "error", "P99 live", "predicted", "TPOT live", "predicted",
    "KV dev % live", "predicted", "host % live", "predicted",
)  # fmt: skip
ORDERED = ("system", "events", "matches", "tokens found, recorded", "replayed", "first difference")


def error(values: dict[str, Any]) -> float:
    """Of the predicted mean TTFT, relative to the live one."""
    return float(values["predicted"]["ttft"]["mean"] / values["live"]["summary"]["ttft_mean"] - 1.0)


def predictions(found: dict[str, Any]) -> list[list[object]]:
    """Rows under :data:`PREDICTED`."""
    rows: list[list[object]] = []
    for name, values in found.items():
        live, said = values["live"]["summary"], values["predicted"]
        rows.append([
            name, live["requests"],
            f"{1000 * live['ttft_mean']:.1f}", f"{1000 * said['ttft']['mean']:.1f}", f"{100 * error(values):+.1f} %",
            f"{1000 * live['ttft_p99']:.0f}", f"{1000 * said['ttft']['p99']:.0f}",
            f"{1000 * live['tpot_mean']:.1f}", f"{1000 * said['tpot']['mean']:.1f}",
            f"{100 * live['hit_device']:.1f}", f"{100 * said['kv_hits']['device']:.1f}",
            f"{100 * live['hit_host']:.1f}", f"{100 * said['kv_hits']['host']:.1f}",
        ])  # fmt: skip
    return rows


def orders(found: dict[str, Any]) -> list[list[object]]:
    """Rows under :data:`ORDERED`."""
    return [
        [
            name, f"{one['events']:,}", f"{one['matches']:,}",
            *(" + ".join(f"{tokens:,}" for tokens in one[key]) for key in ("recorded", "replayed")),
            one["difference"] or "none",
        ]
        for name, one in ((name, values["live"]["order"]) for name, values in found.items())
    ]  # fmt: skip


def aims(found: dict[str, Any]) -> list[reporting.Aim]:
    """Mean TTFT within 10 %, and not one token found otherwise."""
    checks = []
    for name, values in found.items():
        checks.append(reporting.Aim.at_most(f"{name}: error of the mean TTFT", abs(error(values)), AIM))
        one = values["live"]["order"]
        same = one["difference"] is None and list(one["recorded"]) == list(one["replayed"])
        checks.append(reporting.Aim(f"{name}: hits as recorded", float(same), "1", same))
    return checks
