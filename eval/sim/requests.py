"""Requests of a simulation, and the identity of prompt prefixes."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any


class PrefixIds:
    """Gives every distinct prefix, below its adapter, an id of its own; remembers all of them.

    So an id says what a block is *and* all that stands before it. Those that were met since :meth:`forget` are what an
    infinite cache has; ids stay the same over several runs of one workload.
    """

    def __init__(self) -> None:
        self._ids: dict[tuple[int, int], int] = {}
        self._roots: dict[str | None, int] = {}
        self._met = bytearray()

    def __len__(self) -> int:
        return len(self._ids)

    def extend(self, adapter: str | None, known: array[int], blocks: array[int]) -> int:
        """Append to ``known`` the ids of ``blocks[len(known):]``; returns how many of all were met before.

        Mutates ``known``, which holds the ids of ``blocks[:len(known)]``, met before, and this object.
        """
        ids, met = self._ids, self._met
        at = known[-1] if known else self._roots.setdefault(adapter, -1 - len(self._roots))
        there = len(known)
        fresh = False
        for block in blocks[len(known) :]:
            key = (at, block)
            at = ids.get(key, -1)
            if at < 0:
                at = ids[key] = len(met)
                met.append(0)
            if met[at] and not fresh:
                there += 1
            else:
                fresh = True
            met[at] = 1
            known.append(at)
        return there

    def forget(self) -> None:
        """A new run begins: nothing was met."""
        self._met = bytearray(len(self._met))


@dataclass(slots=True, eq=False)
class Request:
    """One turn of a session, on its way through a simulated server.

    Attributes:
        rid: unique.
        number: 0, 1, ... in order of arrival.
        adapter: name; ``None`` for the base model.
        lora_rank: of the adapter; 0 for the base model.
        prompt: ids of the full blocks of the prompt (see :class:`PrefixIds`).
        whole: the same for prompt and answer.
        prompt_tokens, answer_tokens: lengths.
        known: blocks of the prompt that an infinite cache has.
        due: when the workload says it comes: its own time, or that of its session where it follows an answer. The
            same in every run, so this decides what a warm-up leaves out.
        last: whether the session ends with it; what a hint may tell.
        hints: what the client says about the session.
        arrived, first, ended: seconds; the first and last token.
        done: prompt tokens computed or cached so far.
        made: tokens generated so far.
        again: those of them that have to be prefilled, because it was taken back to the queue.
        device, host: prompt tokens found on each tier.
        adapter_tier: where its adapter was: ``device``, ``host``, ``disk``, or ``base``.
        restore_s: seconds to restore what an infinite device would have had.
        cache: the cache model's own notes.
    """

    rid: str
    number: int
    session: str
    adapter: str | None
    lora_rank: int
    prompt: array[int]
    whole: array[int]
    prompt_tokens: int
    answer_tokens: int
    known: int
    due: float
    last: bool
    arrived: float
    hints: Any = None
    first: float = -1.0
    ended: float = -1.0
    done: int = 0
    made: int = 0
    again: int = 0
    device: int = 0
    host: int = 0
    adapter_tier: str = "base"
    restore_s: float = 0.0
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of prompt and answer so far."""
        return self.prompt_tokens + self.made

    @property
    def prefill_tokens(self) -> int:
        """Tokens that must have KV before the next one is generated."""
        return self.prompt_tokens + self.again

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.first - self.arrived

    @property
    def tpot(self) -> float:
        """Seconds per token after the first; 0 for an answer of one token."""
        return (self.ended - self.first) / (self.answer_tokens - 1) if self.answer_tokens > 1 else 0.0
