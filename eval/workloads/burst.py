"""sglang#13349: requests over as many adapters as there were slots, then over twice as many.

There: Llama 3.1 8B, slots for 8 adapters, 100 requests of 4,096 tokens with 2,048 tokens of answer, 4 a second.
Median time to the first token: 39.65 ms with 8 adapters, 6,278 ms with 16. Ours: both parts in one run, 25 s each by
default, requests that share nothing, adapters uniform. The benchmark that it names draws lengths between
``--random-range-ratio`` times these and these, and its default is 0; whether that was changed is not said there. Ours
are fixed unless ``range_ratio`` is given.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from elora_sglang.eval.workloads.model import Piece, Session, Turn, WorkloadError
from elora_sglang.eval.workloads.popularity import Popularity
from elora_sglang.eval.workloads.traffic import Traffic, own_ids


@dataclass(frozen=True, kw_only=True)
class Burst(Traffic):
    """Lengths in tokens. ``first``: how many of ``adapters`` the first half of ``duration_s`` uses."""

    NAME: ClassVar[str] = "burst"
    ABOUT: ClassVar[str] = "long requests over 8 adapters, then over 16 (sglang#13349)"

    rate: float = 4.0
    duration_s: float = 50.0  # 100 requests a part
    adapters: int = 16
    skew: float = 0.0
    drift_s: float = 0.0
    first: int = 8
    prompt_tokens: int = 4096
    answer_tokens: int = 2048
    range_ratio: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("prompt_tokens", "answer_tokens")
        if not 0 <= self.range_ratio <= 1:
            raise WorkloadError(f"range_ratio must lie between 0 and 1, got {self.range_ratio:g}")
        if not 1 <= self.first <= self.adapters:
            raise WorkloadError(f"first must lie between 1 and adapters ({self.adapters}), got {self.first}")

    def _length(self, rng: random.Random, most: int) -> int:
        return rng.randint(max(int(most * self.range_ratio), 1), most)

    def sessions(self) -> Iterator[Session]:
        """See :class:`Traffic`."""
        ids, half, number = own_ids(), self.duration_s / 2, 0
        few = Popularity(self.first, skew=self.skew, drift_s=self.drift_s, redraw=self.redraw, seed=self.seed)
        for start, popularity in ((0.0, few), (half, self.popularity())):
            for after in self.poisson(self.rate, half, start):
                at = round(start + after, 6)
                rng = self.rng(number)
                new = (Piece(next(ids), self._length(rng, self.prompt_tokens)),)
                turn = Turn(0, new, Piece(next(ids), self._length(rng, self.answer_tokens)), at=at)
                yield Session(str(number), popularity.adapter(number, at), (turn,))
                number += 1
