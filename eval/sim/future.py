"""What a workload will ask for, in the order in which it would arrive if answers took a nominal time."""

from __future__ import annotations

from array import array
from collections import defaultdict
from dataclasses import dataclass, field

from elora_sglang.eval.sim.requests import PrefixIds, Request
from elora_sglang.eval.sim.traffic import Arrivals, Traffic
from elora_sglang.eval.workloads.model import Workload

#: Seconds a token of an answer takes, where only an answer's end says when the next turn comes.
NOMINAL_TOKEN_S = 0.01


@dataclass
class Future:
    """All requests of a workload by nominal number.

    Attributes:
        ids: of all prefixes; a run of the same workload takes them over.
        times: nominal arrival of each request.
        due: what a warm-up is compared with (see :class:`~elora_sglang.eval.sim.requests.Request`).
        numbers: nominal number by request id.
        uses: by prefix id, the numbers of requests whose prompt holds it, ascending.
        adapters: the same by adapter.
        adapter_of: adapter of each request.
        born: by prefix id, the number of the request whose prompt or answer held it first.
        depth: by prefix id, blocks before it.
    """

    ids: PrefixIds
    times: array[float] = field(default_factory=lambda: array("d"))
    due: array[float] = field(default_factory=lambda: array("d"))
    numbers: dict[str, int] = field(default_factory=dict)
    uses: dict[int, array[int]] = field(default_factory=lambda: defaultdict(lambda: array("l")))
    adapters: dict[str, array[int]] = field(default_factory=lambda: defaultdict(lambda: array("l")))
    born: dict[int, int] = field(default_factory=dict)
    depth: dict[int, int] = field(default_factory=dict)

    def _add(self, req: Request, matchable: int) -> None:
        number = len(self.times)
        self.times.append(req.arrived)
        self.due.append(req.due)
        self.numbers[req.rid] = number
        if req.adapter is not None:
            self.adapters[req.adapter].append(number)
        for depth, id in enumerate(req.whole):
            if self.born.setdefault(id, number) == number:
                self.depth[id] = depth
            elif depth < matchable:
                self.uses[id].append(number)


def foresee(workload: Workload, block_tokens: int) -> Future:
    """Run through the workload without a server. Costs memory for every use of every block."""
    traffic = Traffic(workload, block_tokens)
    future = Future(traffic.ids)
    coming = Arrivals(traffic.arrivals())
    while coming.next is not None:
        for req in coming.due(coming.next):
            future._add(req, (req.prompt_tokens - 1) // block_tokens)
            req.ended = req.arrived + req.answer_tokens * NOMINAL_TOKEN_S
            following = traffic.follow_up(req)
            if following is not None:
                coming.push(following)
    return future
