"""What live runs stand on: the evaluation model on disk, the emulated link, and servers that share both."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elora_sglang.eval import server
from elora_sglang.eval.serving import model, runner, systems
from elora_sglang.eval.sim.machine import Machine
from elora_sglang.eval.support import reporting
from elora_sglang.eval.support.state import State

#: Profile whose proportions an emulated link has, if no other is named.
GPU = "h200-llama-8b"


class Ground:
    """Model, adapters, link and fleet of one run; :meth:`prepare` comes before all else.

    Args:
        command: the command's name, for messages.
        folder: of the model; written there where it is missing.
        state: cells of the run.
        budget: memory and adapters.
        link: GB/s each way as text, or "auto" for the profile's link-to-compute ratio.
        gpu: whose proportions the link has.

    Attributes:
        vocab: size of the model's vocabulary.
        prefill_s: seconds to prefill one token on this machine.
        link_gbps: of the emulated link; 0: none.
        fleet: the servers.
    """

    def __init__(
        self,
        command: str,
        folder: Path,
        state: State,
        budget: systems.Budget,
        link: str,
        gpu: Machine,
    ) -> None:
        self.command, self.folder, self.state, self.budget = command, folder, state, budget
        self._link, self._gpu = link, gpu
        self.vocab, self.prefill_s, self.link_gbps = 0, 0.0, 0.0
        self.fleet = runner.Fleet(folder, state.folder / "logs", budget, 0.0)

    def prepare(self) -> None:
        """Model on disk, link settled, no server started yet. Raises SystemExit where the model cannot be written."""
        budget = self.budget
        if not model.complete(self.folder, budget.adapters, budget.ranks):
            reporting.progress(f"writing the model and {budget.adapters} adapters to {self.folder}")
            command = [sys.executable, "-m", "elora_sglang.eval.serving.model"]
            status, text = server.run(
                [*command, str(self.folder), str(budget.adapters), ",".join(map(str, budget.ranks))],
                log=self.state.folder / "model.log",
                timeout=900,
            )
            if status != 0:
                raise SystemExit(f"{self.command}: the model could not be written:\n{text[-2000:]}")
        self.vocab = json.loads((self.folder / "base" / "config.json").read_text())["vocab_size"]
        cell = self.state.cell(("prefill", budget.device_tokens), self._probe)
        self.prefill_s = float(cell["prefill_s_per_token"])
        if self._link == "auto":
            self.link_gbps = self._gpu.link_for(model.KV_BYTES_PER_TOKEN, self.prefill_s)
        else:
            self.link_gbps = float(self._link)
        self.fleet = runner.Fleet(self.folder, self.state.folder / "logs", budget, self.link_gbps)

    def _probe(self) -> dict[str, Any]:
        setting = systems.sweep("stock", self.budget, quick=False)[0]
        probe = systems.make("stock", setting, self.budget, self.folder, 0.0)
        reporting.progress("measuring what a token's prefill costs on this machine")
        running = runner.start(probe, self.folder, self.state.folder / "logs", self.budget, 0.0)
        try:
            return {"prefill_s_per_token": runner.prefill_seconds(running, self.vocab)}
        finally:
            running.go()
            running.end()

    def make(self, name: str, setting: float | None = None, without: Sequence[str] = ()) -> systems.System:
        """A system on this ground. Raises ValueError for a setting that does not fit."""
        return systems.make(name, setting, self.budget, self.folder, self.link_gbps, without)

    def running(self, system: systems.System) -> runner.Running:
        """Its server, started where it is not yet there; stopped."""
        self.fleet.want([system])
        return self.fleet.servers[system.key]
