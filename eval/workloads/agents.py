"""Personal agents, the paper's third scenario: Taskmaster dialogs, task -> adapter, arrivals of Azure Functions.

Every adapter has a long preamble, its instructions and tools, that its sessions share; then come many short turns.

Where the numbers come from:

- Taskmaster-1 (Byrne et al., EMNLP 2019, arXiv 1909.05358): some 20 utterances a dialog, so 10 turns of a user. The
  count is from memory of the paper. Geometric is an assumption.
- Words: in 500 dialogs of Taskmaster-4 (TM-4-2024, data_00) the user says 6.6 words a turn and the assistant 12.1,
  with standard deviations of 4.5 and 5.9; at 1.3 tokens a word 8.6 and 15.7 tokens. (These dialogs are orders of
  coffee with 1.9 turns; the reader `taskmaster` plays them as they are.) An agent's answer holds a call of a tool as
  well: 40 tokens in all is an assumption.
- The preamble of 1,500 tokens on average, the same for all sessions of an adapter, is an assumption, and so is the
  think time: people answer a short question within some 10 s.
- Arrivals: see :mod:`.translation`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from elora_sglang.eval.workloads import arrivals
from elora_sglang.eval.workloads.draws import LogNormal, geometric
from elora_sglang.eval.workloads.model import Piece, Session, WorkloadError
from elora_sglang.eval.workloads.traffic import Talk, Traffic, own_ids


@dataclass(frozen=True, kw_only=True)
class Agents(Traffic):
    """Lengths in tokens, times in seconds; means are those of one turn."""

    NAME: ClassVar[str] = "agents"
    ABOUT: ClassVar[str] = "long shared preambles, many short turns, bursty (the paper's Taskmaster scenario)"

    turns: float = 10.0
    preamble_tokens: float = 1500.0
    preamble_sigma: float = 0.4  # an assumption
    preamble_most: int = 6000  # an assumption
    prompt_tokens: float = 8.6
    prompt_sigma: float = 0.62  # the log-normal with the mean and standard deviation above
    prompt_most: int = 256  # an assumption
    answer_tokens: float = 40.0
    answer_sigma: float = 0.5  # as spread as the assistant's words above, with some more for calls
    answer_most: int = 512  # an assumption
    think_s: float = 12.0
    think_sigma: float = 0.7  # an assumption
    think_most: float = 120.0  # an assumption
    on_s: float = 20.0
    off_s: float = 60.0
    context_tokens: int = 8192  # Llama-3-8B's

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.turns < 1:
            raise WorkloadError(f"turns must be at least 1, got {self.turns:g}")
        self._talk()
        self._arrivals()
        self._preamble(0)

    def _talk(self) -> Talk:
        return Talk(
            LogNormal(self.prompt_tokens, self.prompt_sigma, self.prompt_most),
            LogNormal(self.answer_tokens, self.answer_sigma, self.answer_most),
            LogNormal(self.think_s, self.think_sigma, self.think_most),
            self.context_tokens,
        )

    def _preamble(self, adapter: int) -> tuple[Piece, ...]:
        lengths = LogNormal(self.preamble_tokens, self.preamble_sigma, self.preamble_most)
        return (Piece(adapter, lengths.tokens(self.rng("preamble", adapter))),)

    def _arrivals(self) -> Iterator[tuple[float, int]]:
        return arrivals.bursts(
            self.popularity(),
            self.adapters,
            rate=self.rate / self.turns,
            duration_s=self.duration_s,
            on_s=self.on_s,
            off_s=self.off_s,
            seed=self.seed,
        )

    def sessions(self) -> Iterator[Session]:
        """See :class:`Traffic`."""
        talk, ids = self._talk(), own_ids()
        preambles = [self._preamble(adapter) for adapter in range(self.adapters)]
        for number, (at, adapter) in enumerate(self._arrivals()):
            rng = self.rng(number)
            turns = geometric(rng, self.turns)
            yield talk.session(
                rng, ids, number=number, adapter=adapter, at=at, opening=preambles[adapter], turns=turns
            )
