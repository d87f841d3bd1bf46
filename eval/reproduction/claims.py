"""The paper's claims beside what the simulator gives: one row each; why we differ is :mod:`.reasons`' business."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from elora_sglang.eval.reproduction.scene import RESIDENT
from elora_sglang.eval.sim.systems import WITHOUT

#: Results by kind of task: what ``plan.tasks`` computed.
Results = dict[str, list[dict[str, Any]]]
#: A figure of a run, from its figures.
Metric = Callable[[dict[str, Any]], float]
HEADER = ("claim", "paper says", "we get: mean (least to most)", "why we differ")


@dataclass(frozen=True)
class Claim:
    """What the paper says, and how to get ours."""

    what: str
    paper: str
    ours: Callable[[Results], str]

    @property
    def id(self) -> str:
        """What reasons call it."""
        return claim_id(self.what)


def claim_id(what: str) -> str:
    """The id of a claim by its text, as the first column of the table has it."""
    return re.sub(r"[^a-z0-9]+", "-", what.lower()).strip("-")


def _metric(of: str, which: str) -> Metric:
    return lambda figures: float(figures[of][which])


#: In seconds.
mean_ttft, p99_ttft, mean_tpot = _metric("ttft", "mean"), _metric("ttft", "p99"), _metric("tpot", "mean")


def ratios(results: Iterable[dict[str, Any]], base: str, metric: Metric) -> list[float]:
    """ELORA over ``base`` at each of its loads of each scene; over :data:`RESIDENT` at those of each baseline."""
    found = []
    for one in results:
        times: dict[tuple[str, float], dict[str, float]] = {}
        for cell in one["cells"]:
            times.setdefault((cell["of"], cell["load"]), {})[cell["system"]] = metric(cell["figures"])
        mine = (at for (of, _), at in times.items() if base in (of, RESIDENT))
        found += [at["elora"] / at[base] for at in mine if at.get(base)]
    return found


def peak_ratios(results: Iterable[dict[str, Any]], base: str) -> list[float]:
    """ELORA's peak load over that of ``base``, by scene."""
    peaks = [one["peaks"] for one in results]
    return [peak["elora"]["rate"] / peak[base]["rate"] for peak in peaks if peak.get(base, {}).get("rate")]


def invalid_kv(results: Iterable[dict[str, Any]], base: str) -> list[float]:
    """Share of KV in ``base`` that no resident adapter can use, at each of its own loads of each scene."""
    cells = [cell for one in results for cell in one["cells"]]
    return [cell["figures"]["invalid_kv"] for cell in cells if cell["system"] == cell["of"] == base]


def without(results: Results, system: str) -> list[float]:
    """Mean TTFT of ``system`` over that of ELORA, in each scene of the ablations."""
    found = []
    for one in results.get("ablations", []):
        times = {cell["system"]: mean_ttft(cell["figures"]) for cell in one["cells"]}
        if system in times:
            found.append(times[system] / times["elora"])
    return found


# -- one text from many figures --------------------------------------------------------------------


def _told(found: Sequence[float], shape: str) -> str:
    """Mean, least and most; ``shape``: how they are shown."""
    return shape.format(statistics.fmean(found), min(found), max(found)) if found else "not run"


def spread(values: Sequence[float]) -> str:
    """Mean, least and most in percent; "not run" for none."""
    return _told(values, "{:+.1f} % ({:+.1f} to {:+.1f})")


def _change(found: Sequence[float]) -> str:
    return spread([100 * (ratio - 1) for ratio in found])


def _over(base: str, metric: Metric, kind: str = "grid") -> Callable[[Results], str]:
    return lambda results: _change(ratios(results[kind], base, metric))


def _peak(base: str, kind: str = "grid") -> Callable[[Results], str]:
    return lambda results: _change(peak_ratios(results[kind], base))


def _invalid(base: str, kind: str = "grid") -> Callable[[Results], str]:
    return lambda results: spread([100 * share for share in invalid_kv(results[kind], base)])


def _without(system: str) -> Callable[[Results], str]:
    return lambda results: _told(without(results, system), "{:.2f}x ({:.2f} to {:.2f})")


def _terms(results: Results) -> str:
    terms = ("frequency", "recency", "cost", "pressure")
    found = [statistics.fmean(values) for term in terms if (values := without(results, WITHOUT + term))]
    return f"{min(found):.2f}x to {max(found):.2f}x" if found else "not run"


def _burst(results: Results) -> str:
    def change(parts: dict[str, Any]) -> str:
        return f"{1000 * parts['8']['p50']:.0f} to {1000 * parts['16']['p50']:.0f} ms"

    return ", ".join(f"{name}: {change(parts)}" for name, parts in results["burst"][0].items())


def _overhead(results: Results) -> str:
    one = results["overhead"][0]
    return f"{1000 * one['mean_s']:.2f} ms with {one['nodes']:,} nodes"


def _against(
    base: str, what: str, kind: str = "grid", paper: tuple[str, ...] = ("not compared",) * 3
) -> tuple[Claim, ...]:
    """The paper's comparison with vLLM, of another baseline or under other conditions. ``paper``: its figures."""
    ours = (_over(base, mean_ttft, kind), _over(base, p99_ttft, kind), _peak(base, kind))
    names = (f"{metric} against {what}" for metric in ("mean TTFT", "P99 TTFT", "peak load"))
    return tuple(Claim(*one) for one in zip(names, paper, ours, strict=True))


_VLLM = ("-45.7 %", "-73.8 %", "+78.9 %")
_LESS = "1/2 to 1/8 of the memory"
_MANY = "1000 and 2000 adapters"
CLAIMS = (
    Claim("mean TTFT against vLLM", _VLLM[0], _over("vllm", mean_ttft)),
    Claim("mean TPOT against vLLM", "-37.8 %", _over("vllm", mean_tpot)),
    Claim("P99 TTFT against vLLM", _VLLM[1], _over("vllm", p99_ttft)),
    Claim("peak load against vLLM", _VLLM[2], _peak("vllm")),
    Claim("mean TTFT against S-LoRA", "-43.3 %", _over("s-lora", mean_ttft)),
    Claim("peak load against S-LoRA", "+49.9 %", _peak("s-lora")),
    Claim("invalid KV of vLLM", "42.4 %", _invalid("vllm")),
    Claim("TTFT without the tree", "1.51x", _without(WITHOUT + "dependency")),
    Claim("TTFT with LRU instead of the cost model", "1.42x", _without("lru")),
    Claim("TTFT without one term of the score", "1.19x to 1.25x", _terms),
    Claim(f"mean TTFT with {_MANY}, against vLLM", "-48.7 %", _over("vllm", mean_ttft, "many")),
    Claim("match and update of the tree, a query", "under 0.5 ms", _overhead),
)
#: What the paper does not compare with, or not under these conditions, and the field asks for.
BEYOND = (
    *(
        Claim(
            f"mean TTFT over a server with memory for everything, {where}",
            "not compared",
            _over(RESIDENT, mean_ttft, kind),
        )
        for kind, where in (("grid", "the grid"), ("scarce", _LESS), ("many", _MANY))
    ),
    *_against("vllm-split", "a fixed split for adapters, not tuned", paper=_VLLM),
    Claim("invalid KV of a fixed split", "42.4 %", _invalid("vllm-split")),
    *_against("vllm", f"vLLM, {_LESS}", "scarce", _VLLM),
    Claim(f"invalid KV of vLLM, {_LESS}", "42.4 %", _invalid("vllm", "scarce")),
    *_against("hicache", f"tuned SGLang + HiCache, {_LESS}", "scarce"),
    *_against("static", f"the best static share, {_LESS}", "scarce"),
    *_against("hicache", "tuned SGLang + HiCache"),
    *(
        Claim(f"peak load with {_MANY}, against {name}", "not given", _peak(base, "many"))
        for base, name in (("vllm", "vLLM"), ("hicache", "HiCache"))
    ),
    Claim(f"invalid KV of vLLM with {_MANY}", "not given", _invalid("vllm", "many")),
    Claim("median TTFT, 8 adapters to 16 (sglang#13349)", "not compared", _burst),
)


def rows(results: Results) -> list[list[str]]:
    """Rows of :data:`HEADER`, the last column empty. Raises KeyError where a kind of task is missing."""
    return [[one.what, one.paper, one.ours(results), ""] for one in (*CLAIMS, *BEYOND)]
