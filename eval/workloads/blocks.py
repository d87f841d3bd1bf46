"""Ids for the blocks of prompts, equal exactly where the content is: what a simulated cache is keyed with."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b

from elora_sglang.eval.workloads.model import Piece, Session, prompts, tokens

# Blocks inside one piece are an arithmetic sequence from a hashed start. The starts lie below 2^62 and a piece has
# fewer than 2^22 blocks, so no id leaves 63 bits; odd, so that no two pieces run in step by more than chance.
_STEP = 0x9E3779B97F | 1
_START_BITS, _MAX_BLOCKS = 62, 1 << 22


def _hash(values: Sequence[int], bits: int) -> int:
    digest = blake2b(struct.pack(f"<{len(values)}q", *values), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - bits)


class BlockKeys:
    """Turns prompts into one id per block of ``block_tokens`` tokens.

    Two prompts have equal ids at a block if and only if the pieces' spans inside that block are equal; an id says
    nothing of what stands before the block. Ids are 63-bit and the same in every process.

    A block inside one piece costs an addition in C: start(piece id, offset modulo block) + number of the block in
    the piece x a constant. Two of n distinct pieces of at most b blocks collide somewhere with probability below
    n^2 b / 2^62: 10^-5 for 10^5 pieces of 4,000 blocks; and a collision matters only if it is at the same block
    of prompts that agree before it. A block of several spans is hashed with BLAKE2b.

    ``memo``: how many starts are remembered; when it is full it is emptied, which costs time and changes nothing.
    """

    def __init__(self, block_tokens: int, memo: int = 1 << 16) -> None:
        if block_tokens < 1:
            raise ValueError(f"a block has at least 1 token, got {block_tokens}")
        self.block_tokens = block_tokens
        self._memo = memo
        self._starts: dict[tuple[int, int], int] = {}

    def _start(self, piece: int, phase: int) -> int:
        start = self._starts.get((piece, phase))
        if start is None:
            if len(self._starts) >= self._memo:
                self._starts.clear()
            start = self._starts[piece, phase] = _hash((piece, phase), _START_BITS)
        return start

    def keys(self, pieces: Sequence[Piece], *, partial: bool = False) -> array[int]:
        """Ids of a prompt's full blocks; with ``partial``, one more for the tokens after the last full block."""
        return self.extend(array("q"), 0, pieces, partial=partial)

    def extend(
        self, known: array[int], known_tokens: int, pieces: Sequence[Piece], *, partial: bool = False
    ) -> array[int]:
        """The same, where ``known`` are the ids of a prompt that agrees with this one in ``known_tokens`` tokens.

        Only what lies behind is hashed. ``known`` is not changed. Raises ValueError if a piece is too long: 2^22
        blocks or more.
        """
        size = self.block_tokens
        keys = known[: known_tokens // size]
        start = len(keys) * size
        spans: list[int] = []  # of the block that is being filled: piece id, from, tokens
        filled = begin = 0
        for piece in pieces:
            end = begin + piece.tokens
            if end <= start or end == begin:
                begin = end
                continue
            at = max(start - begin, 0)
            if filled:
                taken = min(size - filled, piece.tokens - at)
                spans += (piece.id, at, taken)
                filled += taken
                at += taken
                if filled == size:
                    keys.append(_hash(spans, 63))
                    spans, filled = [], 0
            whole, rest = divmod(piece.tokens - at, size)
            if whole:
                block, phase = divmod(at, size)
                if block + whole >= _MAX_BLOCKS:
                    raise ValueError(f"a piece of {piece.tokens} tokens is too long for blocks of {size}")
                first = self._start(piece.id, phase) + block * _STEP
                keys.extend(range(first, first + whole * _STEP, _STEP))
            if rest:
                spans += (piece.id, piece.tokens - rest, rest)
                filled += rest
            begin = end
        if partial and filled:
            keys.append(_hash(spans, 63))
        return keys

    def turns(self, session: Session) -> Iterator[tuple[array[int], array[int]]]:
        """Per turn, the ids of the prompt's full blocks, and of prompt and answer together."""
        context: tuple[Piece, ...] = ()
        context_keys = array("q")
        for turn, (prompt, answer) in zip(session.turns, prompts(session), strict=True):
            prompt_keys = self.extend(context_keys, tokens(context[: turn.keep]), prompt)
            context = (*prompt, answer)
            context_keys = self.extend(prompt_keys, tokens(prompt), context)
            yield prompt_keys, context_keys
