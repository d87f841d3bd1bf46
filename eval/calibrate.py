"""``python -m elora_sglang.eval calibrate --url URL``: a machine profile for ``simulate``, fitted to a live server.

Sends prompts that no cache knows, alone and in batches, and fits what a prefilled token, a decode step, a token of
context and a LoRA rank cost; sizes come from the server's own description. The server should serve nobody else
meanwhile; its caches are emptied. Links and disk are taken from the server where it tells (``--elora``), else from the
flags.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from elora_sglang.eval import server
from elora_sglang.eval.serving import player
from elora_sglang.eval.sim.machine import Machine
from elora_sglang.eval.support import arguments, reporting
from elora_sglang.eval.workloads.model import Piece, Session, Turn

#: Prompt lengths, batch sizes and answer lengths that are measured.
PROMPTS, BATCHES, ANSWER = (64, 256, 1024, 2048), (1, 2, 4, 8), 48
TIMES = 5


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to ``python -m elora_sglang.eval``."""
    parser = subparsers.add_parser(
        "calibrate", help="fit a machine profile to a live server", description=__doc__.split("\n\n")[1]
    )
    add, positive = parser.add_argument, arguments.positive
    add("--url", required=True, help="of the server, e.g. http://127.0.0.1:30000")
    add("--out", required=True, metavar="FILE", help="the profile is written here (.json)")
    add("--name", help="of the profile (default: model and host)")
    add("--device-tokens", type=arguments.count, help="tokens of KV and adapters (default: as it says)")
    add("--host-tokens", type=arguments.count, help="of host memory (default 4 times the device's)")
    add("--link-gbps", type=positive, default=55.0, help="where it does not tell (default %(default)s)")
    add("--disk-gbps", type=positive, default=3.0, help="adapter files (default %(default)s)")
    add("--seed", type=int, default=0)
    reporting.add_arguments(parser)
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Measured:
    """What was timed: (prompt tokens, TTFT), (batch, context tokens, LoRA ranks, TPOT); seconds."""

    prefills: list[tuple[int, float]]
    decodes: list[tuple[int, int, int, float]]


#: Constants of a prefill and of a decode step, as :class:`~elora_sglang.eval.sim.machine.Machine` names them; and of
#: all, for people: the name, what one unit of the figure is in seconds, the unit.
PREFILL = ("front_s", "prefill_token_s", "prefill_token2_s")
STEP = ("step_s", "step_request_s", "step_context_s", "step_rank_s")
SHOWN = {
    "prefill_token_s": ("prefill of a token", 1e-6, "us"),
    "prefill_token2_s": ("more per 1,000 tokens of context", 1e-9, "us"),
    "front_s": ("outside the scheduler", 1e-3, "ms"),
    "step_s": ("decode step", 1e-3, "ms"),
    "step_request_s": ("more per request", 1e-3, "ms"),
    "step_context_s": ("more per 1,000 tokens of context", 1e-6, "ms"),
    "step_rank_s": ("more per LoRA rank in the batch", 1e-6, "us"),
}


@dataclass(frozen=True)
class Fit:
    """Seconds by name, of :data:`PREFILL` and :data:`STEP`; and the mean relative error of each."""

    constants: dict[str, float]
    prefill_error: float
    decode_error: float


def fit(measured: Measured) -> Fit:
    """Non-negative least squares on relative errors. Raises ValueError where there is too little to fit."""
    if len(measured.prefills) < 3 or len(measured.decodes) < 4:
        raise ValueError("a fit needs at least three prompt lengths and four batches")
    lengths = [[1.0, n, n * (n - 1) / 2] for n, _ in measured.prefills]
    prefill, prefill_error = _least(lengths, [seconds for *_, seconds in measured.prefills])
    batches = [[1.0, *batch] for *batch, _ in measured.decodes]
    step, decode_error = _least(batches, [seconds for *_, seconds in measured.decodes])
    return Fit(dict(zip(PREFILL + STEP, prefill + step, strict=True)), prefill_error, decode_error)


def _least(rows: Sequence[Sequence[float]], times: Sequence[float]) -> tuple[list[float], float]:
    """Constants, and their mean relative error."""
    matrix = np.array(rows, dtype=float) / np.array(times, dtype=float)[:, None]
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    found = nnls(matrix / scale, np.ones(len(times)))[0] / scale
    return found.tolist(), float(np.abs(matrix @ found - 1.0).mean())


class Target(server.Api):
    """The server under calibration."""

    def __init__(self, url: str, seed: int) -> None:
        super().__init__(url.rstrip("/"))
        self._ids = itertools.count(random.Random(f"calibrate/{seed}").getrandbits(60))
        self.info: dict[str, Any] = self.get("/server_info").json()
        config = json.loads((Path(self.info["model_path"]) / "config.json").read_text())
        self.config: dict[str, Any] = config.get("text_config", config)
        names = [one["id"] for one in self.get("/v1/models").json()["data"] if one.get("parent")]
        #: (name, LoRA rank) of the adapters it serves.
        self.adapters = [(name, self._rank(name)) for name in names]

    def _rank(self, name: str) -> int:
        for entry in self.info.get("lora_paths") or []:
            known, path = (
                (entry["lora_name"], entry["lora_path"]) if isinstance(entry, dict) else entry.split("=", 1)
            )
            if known == name:
                return int(json.loads((Path(path) / "adapter_config.json").read_text())["r"])
        raise ValueError(f"adapter {name!r} was not given with --lora-paths: its LoRA rank is not known")

    def send(
        self, prompts: Sequence[int], answer: int, adapters: Sequence[str | None]
    ) -> list[player.Answer]:
        """Prompts of these lengths, known to no cache, at the same time, each with its adapter."""
        names = list(dict.fromkeys(name for name in adapters if name is not None))

        def session(length: int, name: str | None) -> Session:
            number = next(self._ids)
            turn = Turn(0, (Piece(number, length),), Piece(0, answer), at=0.0)
            return Session(str(number), None if name is None else names.index(name), (turn,))

        lanes = [[session(*one)] for one in zip(prompts, adapters, strict=True)]
        return player.serve(self.url, lanes, names, vocab=self.config["vocab_size"]).answers

    def switch_s(self) -> float:
        """Median seconds that a request for an adapter other than the last ones waits longer; 0 where all have room."""
        names = [name for name, _ in self.adapters]
        self.flush()
        others = [self.send([64], 1, [name])[0].ttft for name in names * 2][len(names) :]
        same = [self.send([64], 1, [names[-1]])[0].ttft for _ in names]
        return max(statistics.median(others) - statistics.median(same), 0.0)

    def measure(self) -> Measured:
        """All prefills and decodes, medians of :data:`TIMES`."""
        limit = int(self.info["max_total_num_tokens"]) // 2
        prefills = []
        for length in (n for n in PROMPTS if n < limit):
            times = []
            for _ in range(TIMES):
                self.flush()
                times.append(self.send([length], 1, [None])[0].ttft)
            prefills.append((length, statistics.median(times)))
            reporting.progress(f"prefill of {length} tokens: {1000 * prefills[-1][1]:.1f} ms")
        decodes = []
        most = int(self.info["max_running_requests"])
        for batch in (b for b in BATCHES if b <= most):
            for prompt in (32, 512):
                if batch * (prompt + ANSWER) > limit:
                    continue
                for kinds in sorted({0, 1, min(batch, len(self.adapters))}):
                    decodes.append(self._decode(batch, prompt, kinds))
        return Measured(prefills, decodes)

    def _decode(self, batch: int, prompt: int, kinds: int) -> tuple[int, int, int, float]:
        chosen: list[tuple[str | None, int]] = [(None, 0)]
        if kinds:
            chosen = list(self.adapters[:kinds])
        names = [chosen[i % len(chosen)][0] for i in range(batch)]
        ranks = sum(rank for _, rank in chosen[: min(batch, len(chosen))])
        self.flush()
        answers = self.send([prompt] * batch, ANSWER, names)
        # Those that began before the last one's prefill waited for it: the last one's steps are all decodes.
        tpot = min(answer.tpot for answer in answers)
        reporting.progress(f"a step of {batch} x {prompt} tokens, {ranks} ranks: {1000 * tpot:.1f} ms")
        return batch, batch * (prompt + ANSWER // 2), ranks, tpot


def profile(
    target: Target, found: Fit, *, name: str | None, device_tokens: int | None, host_tokens: int | None,
    link_gbps: float, disk_gbps: float,
) -> Machine:  # fmt: skip
    """The profile of the server; None: by default, as :func:`register` says."""
    config, info = target.config, target.info
    layers, hidden = int(config["num_hidden_layers"]), int(config["hidden_size"])
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head = int(config.get("head_dim") or hidden // heads)
    width = 4 if "32" in str(info.get("dtype") or config.get("dtype") or config.get("torch_dtype")) else 2
    kv = layers * 2 * kv_heads * head * width
    q, k, ffn = heads * head, kv_heads * head, int(config["intermediate_size"])
    per_rank = layers * width * (2 * (hidden + q) + 2 * (hidden + k) + 3 * (hidden + ffn))
    elora = info["internal_states"][0].get("elora") or {}
    link = float(elora.get("link_gbps") or link_gbps) * 1e9
    device = device_tokens or int(info["max_total_num_tokens"])
    errors = f"{found.prefill_error:.0%} of prefills, {found.decode_error:.0%} of steps"
    measured = f"measured by `calibrate`, mean error {errors}"
    return Machine(
        name=name or f"{Path(info['model_path']).name} at {target.url}",
        sources={
            "default": measured,
            "kv_bytes_per_token": "the model's configuration",
            "adapter_bytes_per_rank": "the model's configuration, all linear layers",
            "load_bytes_s": "as the server reports it" if elora.get("link_gbps") else "--link-gbps",
            "disk_bytes_s": "--disk-gbps",
        },
        gpus=int(info.get("tp_size") or 1),
        kv_bytes_per_token=kv,
        adapter_bytes_per_rank=per_rank,
        layers=layers,
        device_bytes=float(device * kv),
        host_bytes=float((host_tokens or 4 * device) * kv),
        load_bytes_s=link,
        save_bytes_s=link,
        disk_bytes_s=disk_gbps * 1e9,
        latency_s=2e-5,
        iteration_s=0.0,  # in the steps and in front_s
        **found.constants,
        slot_load_s=0.0,
        max_running=int(info["max_running_requests"]),
        chunk_tokens=int(info.get("chunked_prefill_size") or 8192),
    )


def run(args: argparse.Namespace) -> int:
    """Measure, fit, write; returns the exit status."""
    try:
        target = Target(args.url, args.seed)
        measured = target.measure()
        found = fit(measured)
        machine = profile(
            target, found, name=args.name, device_tokens=args.device_tokens, host_tokens=args.host_tokens,
            link_gbps=args.link_gbps, disk_gbps=args.disk_gbps,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SystemExit(f"calibrate: {args.url}: {type(error).__name__}: {error}") from None
    Path(args.out).write_text(machine.to_json(), encoding="utf-8")
    rows = [[what, f"{found.constants[key] / unit:.3g} {of}"] for key, (what, unit, of) in SHOWN.items()]
    rows.append(["error of prefills, of steps", f"{found.prefill_error:.1%}, {found.decode_error:.1%}"])
    reporting.progress(f"wrote {args.out}")
    shown = [reporting.Table(machine.name, ["", ""], rows)]
    return reporting.finish(args, shown, [], {"profile": json.loads(machine.to_json())})
