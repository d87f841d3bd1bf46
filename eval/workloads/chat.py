"""Chat, the paper's first scenario: LMSYS conversations, model name -> adapter. Several turns with think times.

Where the numbers come from:

- LMSYS-Chat-1M (Zheng et al., ICLR 2024, arXiv 2309.11998), table 1: 2.0 turns a conversation, 69.5 tokens a
  prompt and 214.5 an answer, on average. Their spread is not given. Ours: log-normal, with a sigma that puts the
  median prompt at some 20 tokens and the median answer at some 150, cut where FastChat's demo cut them.
- Turns are geometric: BurstGPT (arXiv 2401.17644) has a median of 2 and 75 % of conversations within 4; the
  multi-turn conversations of ServeGen (arXiv 2505.09999) have 3.5 on average.
- Think times: ServeGen puts the time between turns at about 100 s. The Mooncake conversation trace has gaps of 42,
  123 and 480 s (10th, 50th, 90th percentile) with sigma 0.98 of the logarithm, answering included. Ours: log-normal
  with that sigma, mean 160 s, so median 100 s.
- Arrivals of sessions: Poisson, an assumption.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from elora_sglang.eval.workloads.model import Piece, WorkloadError
from elora_sglang.eval.workloads.traffic import Conversations


@dataclass(frozen=True, kw_only=True)
class Chat(Conversations):
    """``system_tokens``: a system prompt that all sessions of an adapter share, 0 for none (LMSYS has none)."""

    NAME: ClassVar[str] = "chat"
    ABOUT: ClassVar[str] = "conversations with think times (the paper's LMSYS scenario)"

    turns: float = 2.0
    prompt_tokens: float = 69.5
    prompt_sigma: float = 1.6  # an assumption, see above
    prompt_most: int = 3072  # an assumption: what FastChat let through of a context of 4096
    answer_tokens: float = 214.5
    answer_sigma: float = 0.85  # an assumption, see above
    answer_most: int = 1024  # FastChat's largest "max output tokens"
    think_s: float = 160.0
    think_sigma: float = 0.98
    think_most: float = 1800.0  # an assumption: who is away for longer does not come back
    system_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.system_tokens < 0:
            raise WorkloadError(f"system_tokens must be at least 0, got {self.system_tokens}")

    def opening(self, adapter: int) -> tuple[Piece, ...]:
        """The system prompt."""
        return (Piece(adapter, self.system_tokens),) if self.system_tokens else ()

    def begins(self) -> Iterator[tuple[float, int]]:
        """Poisson."""
        popularity = self.popularity()
        times = self.poisson(self.rate / self.turns, self.duration_s)
        return ((at, popularity.adapter(number, at)) for number, at in enumerate(times))
