"""ELORA's own score: for KV and adapters alike, the seconds that keeping a byte is expected to save.

``log2(w) + t_last / H + log2(way back in seconds / bytes)``, ``w <- 1 + w * 2^(-dt / 8 H)`` at every use; H is twice
the median gap between the turns of conversations, learned (:mod:`~elora_sglang.core.policies.support.reuse_clock`).
The way back of a node with a complete host copy is the load, of KV without one its recomputing, of an adapter
without one its file; on the host a copy is worth what it saves over doing without. An adapter is never less probable
than the KV below it; it counts more while requests wait for it, and while fewer adapters are on the device
than a batch needs (Low_lora). Counts survive eviction as ghosts. Session hints, and a predictor of return where it has
proved itself, raise or lower the tail of a session that nobody else uses.
"""

from __future__ import annotations

import heapq
import math

from elora_sglang.core.hints import Hints
from elora_sglang.core.policies.base import BasePolicy, PolicyView
from elora_sglang.core.policies.support.adapter_demand import AdapterDemand
from elora_sglang.core.policies.support.elora_state import BOTTOM, SHARED, ReuseState
from elora_sglang.core.policies.support.ghosts import Ghost, GhostKey, GhostList, ghost_key
from elora_sglang.core.policies.support.path_digests import path_digests
from elora_sglang.core.policies.support.return_predictor import MOST_QUESTIONS, Question, ReturnPredictor
from elora_sglang.core.policies.support.reuse_clock import STANDARD_S, ReuseClock
from elora_sglang.core.tree.node import Node

#: A hinted return is waited for this share longer, and so many seconds.
SLACK, SLACK_S = 0.25, 10.0

#: Bits of an adapter that waiting requests need, and most bits for too few adapters on the device.
WAITING_BITS, MOST_PRESSURE_BITS = 3.0, 3.0

#: Most bits by which the predictor lowers and raises.
LEAST_BIAS, MOST_BIAS = -6.0, 2.0

#: Nodes at the end of a session's path that a hint or a prediction moves.
TAIL = 64

#: A host copy of what the device has too is worth half: it is needed only once the device has let go of it.
RESIDENT_DISCOUNT = 1.0


_SILENT = Hints()


class Elora(BasePolicy):
    """Value density for both kinds and both tiers. ``policy_state``: a :class:`ReuseState`.

    Costs are taken at a node's own events, so refined costs reach a node with its next use. An adapter's bits for
    waiting requests and pressure are scored again in turn, a slice a tick.
    """

    def __init__(self) -> None:
        self._demand = AdapterDemand(STANDARD_S)
        self._clock = ReuseClock()
        self._ghosts = GhostList()
        self._predictor = ReturnPredictor()
        self._asked: dict[GhostKey, Question] = {}
        self._expected: list[tuple[float, int, Node]] = []
        self._sessions = False
        self._pressed_by, self._pressed = (0.0, 1), 0.0
        self._switch(frozenset())

    def bind(self, view: PolicyView) -> None:
        """Keeps the view and the terms that are switched off."""
        super().bind(view)
        self._switch(view.switched_off)

    def _switch(self, off: frozenset[str]) -> None:
        self._frequency, self._recency = "frequency" not in off, "recency" not in off
        self._cost, self._pressure = "cost" not in off, "pressure" not in off
        self._hints, self._predicts = "hints" not in off, "predictor" not in off
        self._remember = "ghosts" not in off

    # -- the score ----------------------------------------------------------------------------------

    def priority(self, node: Node) -> float:
        """Expected seconds saved per byte on the device, in bits."""
        return self._values(node, node.policy_state or self._state(node))[0]

    def host_priority(self, node: Node) -> float:
        """Expected seconds saved per byte on the host, in bits."""
        return self._values(node, node.policy_state or self._state(node))[1]

    def _values(self, node: Node, state: ReuseState, likely: float | None = None) -> tuple[float, float]:
        """:meth:`priority` and :meth:`host_priority`: the one place that has the score.

        ``likely``: the node's probability bits, where they are known already.
        """
        if likely is None:
            likely = state.probability_bits(self._frequency, self._recency, self._clock)
        on_device = on_host = likely + state.extra
        if self._cost:
            on_device += state.clean_bits if node.host and node.clean else state.dirty_bits
            on_host += state.host_bits - (RESIDENT_DISCOUNT if node.resident else 0.0)
        return (on_device, on_host) if not state.ended else (BOTTOM + on_device, BOTTOM + on_host)

    def _state(self, node: Node) -> ReuseState:
        state: ReuseState | None = node.policy_state
        if state is None:
            state = node.policy_state = self._new_state(node)
        return state

    def _new_state(self, node: Node) -> ReuseState:
        ghost = None
        state = ReuseState(1.0, self._clock.now, self.view.now)
        if len(self._ghosts):
            ghost = self._ghosts.recall(ghost_key(node, self.view.page_size))
        if ghost is not None:
            state = ReuseState(ghost.weight, ghost.last_use, ghost.at)
            self._clock.observe(self.view.now - ghost.at)
            state.use(self._clock, self.view.now)
        above = node.parent
        if node.kind == "kv" and above is not None and above.kind == "kv":
            state.start = self._state(above).start + above.size
        state.price(node, self.view.costs)
        return state

    def _changed(self, node: Node, state: ReuseState, before: tuple[float, float]) -> None:
        """After a change that may have lowered ``node``: its adapter keeps up, its entries follow.

        ``before``: its :meth:`_values` before the change.
        """
        likely = state.probability_bits(self._frequency, self._recency, self._clock)
        if node.kind == "kv" and node.adapter is not None and node.adapter.size and not state.ended:
            above = self._state(node.adapter)
            above.floor = max(above.floor, likely)
        on_device, on_host = self._values(node, state, likely)
        if on_device < before[0] or on_host < before[1]:
            self.view.reprioritize(node)

    # -- events -------------------------------------------------------------------------------------

    def on_insert(self, node: Node) -> None:
        """A new node takes up its ghost; an adapter joins the turn."""
        super().on_insert(node)
        if node.kind == "adapter" and node.size:
            self._demand.resident.add(node)
        state = self._state(node)
        before = self._values(node, state)
        state.price(node, self.view.costs)
        if node.kind == "adapter":
            self._score_adapter(node)
        self._changed(node, state, (before[0], before[1] + RESIDENT_DISCOUNT))

    def on_use(self, node: Node) -> None:
        """Counts the use; what was hinted or predicted about it has come true."""
        now, state = self.view.now, self._state(node)
        before = self._values(node, state)
        if node.kind == "adapter":
            self._demand.use(node.key, now)
            self._clock.next_request()
        else:
            self._clock.used(now - state.at, node.visits)
        state.use(self._clock, now)
        state.price(node, self.view.costs)
        self._changed(node, state, before)

    def on_split(self, upper: Node, lower: Node) -> None:
        """Both halves keep the figures."""
        state = self._state(lower)
        before = self._values(lower, state)
        upper.policy_state = above = state.copy()
        state.start = above.start + upper.size
        above.priced_by = state.priced_by = None
        above.price(upper, self.view.costs)
        state.price(lower, self.view.costs)
        if state.expected_until:
            heapq.heappush(self._expected, (state.expected_until, upper.id, upper))
        self._changed(lower, state, before)

    def on_evict(self, node: Node) -> None:
        """An adapter leaves the turn."""
        if node.kind == "adapter":
            self._demand.resident.discard(node)
            self._state(node).extra = 0.0
            self.view.reprioritize(node)

    def on_drop(self, node: Node) -> None:
        """The counts stay behind as a ghost; those of an adapter's node stay in the tree with it."""
        if self._remember and (node.kind == "kv" or node.doomed):
            state = self._state(node)
            self._ghosts.remember(
                ghost_key(node, self.view.page_size), Ghost(state.weight, state.used, state.at)
            )
        elif not self._remember and node.kind == "adapter":
            node.policy_state = None

    def on_finish(self, node: Node, hints: Hints) -> None:
        """The end of a turn: who used the path, and will anybody use its tail again?"""
        if node.kind != "kv" or node.parent is None:
            return
        turns, place = self._recognise(node) if self._predicts else (1, None)
        session = hints.session if self._hints else None
        if self._hints:
            self._claim(node, session)
            if hints.session_end:
                for one in self._tail(node, session):
                    self._judge(one, ended=True)
                return
            if hints.expect_return_s is not None:
                self._expect_return(node, hints)
        if place is not None:
            self._ask_predictor(node, turns, place, hints if self._hints else _SILENT)

    def _recognise(self, node: Node) -> tuple[int, GhostKey | None]:
        """How many turns the conversation has had, this one included; and the place by which to know it again."""
        key = None if node.adapter is None else node.adapter.key
        turns, place = 0, None
        for _, digest in path_digests(node):
            place = (key, digest)
            question = self._asked.pop(place, None)
            if question is not None:
                self._predictor.returned(question, self._clock.now)
                turns = max(turns, question.turns)
        return turns + 1, place

    def _claim(self, node: Node, session: str | None) -> None:
        """Note on the path to ``node`` that ``session`` used it."""
        if session is None and not self._sessions:
            return
        self._sessions = True
        name, one = session or SHARED, node
        while one.kind == "kv":
            state = self._state(one)
            state.session = name if state.session in (None, name) else SHARED
            if one.parent is None:
                return
            one = one.parent

    def _tail(self, node: Node, session: str | None) -> list[Node]:
        """The nodes at the end of the path that only this session used, deepest first.

        Without a name: up to the first node with another branch, or used by more requests than the next turn.
        """
        tail: list[Node] = []
        below: Node | None = None
        while node.kind == "kv" and len(tail) < TAIL and len(node.children) <= (below is not None):
            state = self._state(node)
            if session is not None and state.session != session:
                break
            if session is None and below is not None and node.visits > below.visits + 1:
                break
            tail.append(node)
            if node.parent is None:
                break
            below, node = node, node.parent
        return tail

    def _judge(self, node: Node, *, ended: bool = False, bias: float = 0.0) -> None:
        """Whether its session has ended, and the bits by which the predictor moves it."""
        state = self._state(node)
        before = self._values(node, state)
        state.ended, state.bias = ended, bias
        self._changed(node, state, before)

    def _expect_return(self, node: Node, hints: Hints) -> None:
        """The hint says when the session of ``node`` comes back: its tail is kept for that."""
        now, wait = self.view.now, hints.expect_return_s or 0.0
        until = now + wait * (1.0 + SLACK) + SLACK_S
        for one in self._tail(node, hints.session):
            state = self._state(one)
            before = self._values(one, state)
            state.expected, state.expected_until, state.ended = now + wait, until, False
            state.expected_half_life_s = self._clock.half_life_s
            heapq.heappush(self._expected, (until, one.id, one))
            self._changed(one, state, before)

    def _ask_predictor(self, node: Node, turns: int, place: GhostKey, hints: Hints) -> None:
        """Open the question whether the conversation goes on, and act on what is predicted, if anything is."""
        self._asked[place] = self._predictor.ask(place[0], turns, self._clock.now)
        if len(self._asked) > MOST_QUESTIONS:
            del self._asked[next(iter(self._asked))]
        if hints.expect_return_s is not None:
            return  # told, nothing to predict
        predicted = self._predictor.predict(place[0], turns)
        if predicted is not None:
            ratio = max(predicted, 1e-3) / max(self._predictor.base_rate, 1e-3)
            bias = min(max(math.log2(ratio), LEAST_BIAS), MOST_BIAS)
            for one in self._tail(node, hints.session):
                self._judge(one, bias=bias)

    def on_tick(self) -> None:
        """Demand for adapters, adapters in turn, hints and questions whose time is up: bounded slices of each."""
        now = self.view.now
        self._clock.advance(now)
        self._demand.tick(self.view)
        for node in self._demand.resident.take():
            if self._score_adapter(node):
                self.view.reprioritize(node)
        self._predictor.expire(self._clock.now)
        for _ in range(256):
            if not self._expected or self._expected[0][0] >= now:
                break
            until, _, node = heapq.heappop(self._expected)
            state: ReuseState | None = node.policy_state
            if state is not None and state.expected_until == until and node.parent is not None:
                before = self._values(node, state)
                state.expected = state.expected_until = 0.0
                self._changed(node, state, before)

    def _score_adapter(self, node: Node) -> bool:
        """An adapter's bits for waiting requests and pressure; whether they fell."""
        state, bits = self._state(node), 0.0
        if self._pressure:
            waiting = self.view.waiting_for(node.key)
            if waiting:
                bits += WAITING_BITS + math.log2(waiting)
            bits += self._pressure_bits()
        fell, state.extra = bits < state.extra, bits
        return fell

    def _pressure_bits(self) -> float:
        """What every adapter counts more while fewer are on the device than a batch needs."""
        low, there = self._demand.low_lora, max(self.view.resident_adapters() - 1, 1)
        if (low, there) != self._pressed_by:  # it is asked for far more often than it changes
            self._pressed_by = low, there
            self._pressed = min(max(math.log2(max(low, 1.0) / there), 0.0), MOST_PRESSURE_BITS)
        return self._pressed

    def on_reset(self) -> None:
        """Only what was learned about returns stays."""
        self._demand.clear()
        self._ghosts.clear()
        self._asked.clear()
        self._expected.clear()


def create() -> Elora:
    """A fresh policy."""
    return Elora()
