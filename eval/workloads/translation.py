"""Translation, the paper's second scenario: OPUS-100, language pair -> adapter, arrivals of Azure Functions.

One short request a session: a line of instruction that all requests of a language pair share, and a sentence.

Where the numbers come from:

- OPUS-100 (Zhang et al., ACL 2020, arXiv 2004.11867) has 99 language pairs with English and single sentences from
  subtitles to law. Its files have 41 bytes a sentence in Slovene and 90 in Arabic (two bytes a letter), some 10 words.
  That is 15 to 25 tokens; that the mean is 20 and log-normal with sigma 0.8 is our assumption.
- The instruction ("Translate from ... to ...:" with a chat template) of 24 tokens is an assumption.
- Arrivals: the Azure Functions traces show most functions called rarely and in bursts, and a few called very often
  (Shahrad et al., USENIX ATC 2020). The paper gives the n most used functions to the n adapters. Ours: Zipf over
  adapters, each switched on and off (:class:`.traffic.Bursty`); on for 20 s and off for 60 s on average is an
  assumption.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from elora_sglang.eval.workloads.draws import LogNormal
from elora_sglang.eval.workloads.model import Piece, Session, Turn, WorkloadError
from elora_sglang.eval.workloads.traffic import Bursty, own_ids


@dataclass(frozen=True, kw_only=True)
class Translation(Bursty):
    """Lengths in tokens, times in seconds. ``instruction_tokens``: shared by an adapter's requests, 0 for none."""

    NAME: ClassVar[str] = "translation"
    ABOUT: ClassVar[str] = "single short requests, bursty per adapter (the paper's OPUS-100 scenario)"

    sentence_tokens: float = 20.0
    sentence_sigma: float = 0.8
    sentence_most: int = 512  # an assumption
    # Languages differ in tokens a sentence; the answer is the sentence's length times a log-normal factor.
    answer_ratio: float = (
        1.2  # an assumption: half the answers are in languages that tokenizers know less well
    )
    answer_sigma: float = 0.3  # an assumption
    instruction_tokens: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.instruction_tokens < 0:
            raise WorkloadError(f"instruction_tokens must be at least 0, got {self.instruction_tokens}")
        self.bursts(self.rate)
        self._lengths()

    def _lengths(self) -> tuple[LogNormal, LogNormal]:
        sentence = LogNormal(self.sentence_tokens, self.sentence_sigma, self.sentence_most)
        return sentence, LogNormal(self.answer_ratio, self.answer_sigma, 4 * self.answer_ratio)

    def sessions(self) -> Iterator[Session]:
        """See :class:`Traffic`."""
        (sentence, ratio), ids = self._lengths(), own_ids()
        for number, (at, adapter) in enumerate(self.bursts(self.rate)):
            rng = self.rng(number)
            length = sentence.tokens(rng)
            answer = max(1, round(length * ratio.draw(rng)))
            shared = (Piece(adapter, self.instruction_tokens),) if self.instruction_tokens else ()
            new = (*shared, Piece(next(ids), length))
            turn = Turn(0, new, Piece(next(ids), answer), at=round(at, 6))
            yield Session(str(number), adapter, (turn,))
