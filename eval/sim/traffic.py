"""A workload's sessions as requests that arrive at a simulated server."""

from __future__ import annotations

import heapq
import itertools
import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from elora_sglang.core.hints import Hints
from elora_sglang.eval.sim.requests import PrefixIds, Request
from elora_sglang.eval.workloads.blocks import BlockKeys
from elora_sglang.eval.workloads.model import Adapter, Session, Workload, prompts, tokens


@dataclass(frozen=True)
class HintQuality:
    """How well clients tell the end of their sessions.

    Attributes:
        recall: share of last turns that say so.
        false: share of other turns that say so as well.
        seed: of the draw, which is by session and turn.
    """

    recall: float = 0.0
    false: float = 0.0
    seed: int = 0

    def hints(self, session: str, turn: int, last: bool) -> Hints | None:
        """What this turn says; None where clients never say anything."""
        if not self.recall and not self.false:
            return None
        draw = random.Random(f"hints/{self.seed}/{session}/{turn}").random()
        return Hints(session, session_end=draw < (self.recall if last else self.false))


class _Talk:
    """A session that goes on: which turn is next, and the ids of what was said."""

    def __init__(self, session: Session, keys: BlockKeys, adapter: Adapter | None) -> None:
        self.session, self._adapter = session, adapter
        self.turn = 0
        self._keys = keys.turns(session)
        self._lengths = prompts(session)
        self._known: array[int] = array("q")
        self._blocks: array[int] = array("q")

    def request(self, ids: PrefixIds, at: float, number: int, hints: HintQuality) -> Request:
        """Its next turn, arriving at ``at``. Mutates this and ``ids``."""
        session, turn = self.session, self.turn
        adapter, lora_rank = (self._adapter.name, self._adapter.rank) if self._adapter else (None, 0)
        prompt_keys, whole_keys = next(self._keys)
        pieces, answer = next(self._lengths)
        known = self._shared(prompt_keys)
        there = ids.extend(adapter, known, prompt_keys)
        prompt = known[:]
        ids.extend(adapter, known, whole_keys)
        self._known, self._blocks = known, whole_keys
        self.turn += 1
        last = self.turn == len(session.turns)
        due = session.start if session.turns[turn].at is None else at
        return Request(
            rid=f"{session.id}/{turn}", number=number, session=session.id, adapter=adapter, lora_rank=lora_rank,
            prompt=prompt, whole=known, prompt_tokens=tokens(pieces), answer_tokens=answer.tokens, known=there, due=due,
            last=last, arrived=at, hints=hints.hints(session.id, turn, last),
        )  # fmt: skip

    def _shared(self, blocks: array[int]) -> array[int]:
        """Ids of the leading blocks that the context so far has as well; an array of its own."""
        most = min(len(self._blocks), len(blocks))
        if self._blocks[:most] == blocks[:most]:
            return self._known[:most]
        same = next(i for i, (a, b) in enumerate(zip(self._blocks, blocks, strict=False)) if a != b)
        return self._known[:same]


class Traffic:
    """Requests of one workload, in order of arrival; sessions of a closed loop go on as their answers come.

    Args:
        workload: sessions.
        block_tokens: tokens of a slot.
        hints: what clients say about the end of sessions.
        ids: of an earlier run of the same workload, to have the same ids.

    Attributes:
        adapters: LoRA rank by name.
        ids: all prefixes so far.
    """

    def __init__(
        self,
        workload: Workload,
        block_tokens: int,
        hints: HintQuality | None = None,
        ids: PrefixIds | None = None,
    ) -> None:
        self._workload, self._hints = workload, hints or HintQuality()
        self._keys = BlockKeys(block_tokens)
        self.adapters = {adapter.name: adapter.rank for adapter in workload.header.adapters}
        self.ids = ids if ids is not None else PrefixIds()
        self.ids.forget()
        self._talks: dict[str, _Talk] = {}
        self._numbers = itertools.count()

    def arrivals(self) -> Iterator[Request]:
        """Turns whose arrival the workload fixes, in order; to be iterated once."""
        later: list[tuple[float, int, _Talk]] = []  # turns of sessions under way
        order = itertools.count()
        for session in self._workload.sessions():
            while later and later[0][0] <= session.start:
                yield from self._go_on(later, order)
            adapter = None if session.adapter is None else self._workload.header.adapters[session.adapter]
            talk = _Talk(session, self._keys, adapter)
            heapq.heappush(later, (session.start, next(order), talk))
        while later:
            yield from self._go_on(later, order)

    def _go_on(self, later: list[tuple[float, int, _Talk]], order: Iterator[int]) -> Iterator[Request]:
        at, _, talk = heapq.heappop(later)
        yield self._request(talk, at)
        turns = talk.session.turns
        if talk.turn < len(turns):
            fixed = turns[talk.turn].at
            if fixed is None:
                self._talks[talk.session.id] = talk
            else:
                heapq.heappush(later, (fixed, next(order), talk))

    def follow_up(self, req: Request) -> Request | None:
        """The next turn of a closed-loop session whose last answer has ended; None where there is none."""
        talk = self._talks.get(req.session)
        if talk is None:
            return None
        think = talk.session.turns[talk.turn].think
        assert think is not None
        following = self._request(talk, req.ended + think)
        if talk.turn == len(talk.session.turns):
            del self._talks[req.session]
        return following

    def _request(self, talk: _Talk, at: float) -> Request:
        return talk.request(self.ids, at, next(self._numbers), self._hints)


class Arrivals:
    """Requests that are still to come, from a stream and from sessions that go on; the earliest first."""

    def __init__(self, stream: Iterable[Request]) -> None:
        self._stream = iter(stream)
        self._heap: list[tuple[float, int, Request]] = []
        self._count = 0
        self._pull()

    def _pull(self) -> None:
        req = next(self._stream, None)
        self._streaming = req is not None
        if req is not None:
            self.push(req)
            self._last = req

    def push(self, req: Request) -> None:
        """Add an arrival."""
        self._count += 1
        heapq.heappush(self._heap, (req.arrived, self._count, req))

    @property
    def next(self) -> float | None:
        """When the next one arrives, as far as is known."""
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> list[Request]:
        """Take out all requests that arrived by ``now``."""
        found = []
        while self._heap and self._heap[0][0] <= now:
            req = heapq.heappop(self._heap)[2]
            found.append(req)
            if self._streaming and req is self._last:
                self._pull()
        return found
