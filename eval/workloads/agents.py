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

from elora_sglang.eval.workloads.draws import LogNormal
from elora_sglang.eval.workloads.model import Piece
from elora_sglang.eval.workloads.traffic import Bursty, Conversations


@dataclass(frozen=True, kw_only=True)
class Agents(Bursty, Conversations):
    """``preamble_tokens`` and what follows it: of an adapter's preamble."""

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

    def opening(self, adapter: int) -> tuple[Piece, ...]:
        """The preamble."""
        lengths = LogNormal(self.preamble_tokens, self.preamble_sigma, self.preamble_most)
        return (Piece(adapter, lengths.tokens(self.rng("preamble", adapter))),)

    def begins(self) -> Iterator[tuple[float, int]]:
        """In bursts."""
        return self.bursts(self.rate / self.turns)
