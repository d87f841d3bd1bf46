"""Everything that ``reproduce`` runs, as named tasks that finish by themselves and can be cached."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from elora_sglang.core.policies import policy_names
from elora_sglang.eval.reproduction import burst, gap, overhead
from elora_sglang.eval.reproduction.scene import Scene, Turns, measure
from elora_sglang.eval.sim import systems

MODELS = ("h800-llama-8b", "h800-llama-34b", "h800-llama-70b")
ADAPTERS = (20, 50, 100)
WORKLOADS = ("chat", "translation", "agents")
CENTRE = Scene("h800-llama-34b", "chat", 50)
SKEWS, MANY = (0.0, 0.6, 1.2), (1000, 2000)
DRIFTS_S = (60.0, 0.0)
#: Shares of the profile's memory; an eighth is what a GPU of 24 GB has beside the weights of an 8B model.
SCARCE = (0.5, 0.25, 0.125)
SCARCE_BASELINES = ("vllm", "vllm-split", "hicache", "static")
ABLATION_LOADS = (0.5, 0.8)
#: Kinds of tasks; ``gap`` only with a trace.
KINDS = ("centre", "ablations", "scarce", "gap", "grid", "many", "skew", "drift", "burst", "overhead")
#: Shares of ELORA's peak.
SWEEP = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)
#: The burst as it was reported, and for longer.
BURSTS = ((4.0, 50.0), (4.0, 400.0))


@dataclass(frozen=True)
class Task:
    """One cell on disk: its key, and how to compute it."""

    key: tuple[object, ...]
    work: Callable[[], dict[str, Any]]

    @property
    def kind(self) -> str:
        """What it belongs to."""
        return str(self.key[0])

    @property
    def name(self) -> str:
        """For a progress bar."""
        return " ".join(str(part) for part in self.key[:4])


def policies() -> list[str]:
    """All policies by their public names."""
    return [name.replace("_", "-") for name in policy_names()]


def tasks(turns: Turns, trace: Path | None) -> Iterator[Task]:
    """All tasks, the most telling first. ``trace``: conversations for the gaps, which are left out without it."""
    sizes = (turns.reported, turns.search)

    def scene_task(kind: str, scene: Scene, **how: Any) -> Task:
        return Task(
            (kind, *scene.key(), *sizes, *map(str, how.values())), lambda: measure(scene, turns, **how)
        )

    others = ("stock-overlap", "vllm-offload", *(name for name in policies() if name != "elora"))
    yield scene_task("centre", CENTRE, loads=(0.7,), beside=others, sweep=SWEEP)
    parts = ("lru", *(name for name in systems.systems() if name.startswith(systems.WITHOUT)))
    yield scene_task("ablations", CENTRE, baselines=("hicache",), loads=ABLATION_LOADS, beside=parts)
    scarce = [Scene(MODELS[0], "chat", 100, memory=share) for share in SCARCE]
    yield scene_task("ablations", scarce[1], baselines=("hicache",), loads=ABLATION_LOADS, beside=parts)
    for scene in scarce:
        yield scene_task("scarce", scene, baselines=SCARCE_BASELINES)
    if trace is not None:
        for memory in gap.MEMORIES:
            for host in gap.HOSTS:
                for number in range(gap.SAMPLES):
                    yield Task(
                        ("gap", trace.name, memory, host, number),
                        partial(gap.measure, trace, memory, host, number),
                    )
    grid = [Scene(*place) for place in itertools.product(MODELS, WORKLOADS, ADAPTERS)]
    near = [scene for scene in grid if distance(scene, CENTRE) < 2]
    for scene in near:
        yield scene_task("grid", scene)
    for adapters in MANY:
        yield scene_task("many", Scene(MODELS[0], "chat", adapters), baselines=("vllm", "hicache"))
    for skew in SKEWS:
        scene = Scene(MODELS[0], "chat", 100, skew=skew)
        yield scene_task("skew", scene, baselines=("vllm", "hicache"), loads=(0.7,))
    for drift_s in DRIFTS_S:
        scene = Scene(MODELS[0], "chat", 100, drift_s=drift_s)
        yield scene_task("drift", scene, baselines=("vllm", "hicache"), loads=(0.7,))
    for rate, duration_s in BURSTS:
        yield Task(("burst", rate, duration_s), partial(burst.measure, rate, duration_s))
    yield Task(("overhead",), overhead.measure)
    for scene in grid:
        if scene not in near:
            yield scene_task("grid", scene)


def distance(one: Scene, other: Scene) -> int:
    """In how many of model, workload and adapters two scenes differ."""
    return sum(getattr(one, name) != getattr(other, name) for name in ("machine", "workload", "adapters"))


def complete(kinds: set[str]) -> bool:
    """Whether results of these kinds fill the table of claims."""
    return {"grid", "scarce", "ablations", "many", "burst", "overhead"} <= kinds
