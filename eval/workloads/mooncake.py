"""Mooncake's traces: ``{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [...]}`` a line.

A hash id stands for a block of 512 tokens *and everything before it*, so a block is a piece with the hash as its
id; the last one of a prompt is as long as what is left. All requests share block 0, the system prompt; who shares
block 1 as well is the same session, and its adapter must be one. A request of a single block is a session of its own.
Outputs have no hashes and no later prompt refers to them: every answer is new content and is never kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elora_sglang.eval.workloads.file import bad, lines, parse
from elora_sglang.eval.workloads.model import MAX_ID, Piece, Session, Turn, common

BLOCK_TOKENS = 512
KEYS = ("timestamp", "input_length", "output_length", "hash_ids")
ADVICE = 'a line is {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}'

# When (ms), prompt, answer.
Request = tuple[float, tuple[Piece, ...], Piece]


def _number(row: dict[str, Any], key: str, path: Path, line: int, least: int) -> float:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < MAX_ID:
        raise bad(path, line, f"{key} is {value!r}, not a number of at least {least}", ADVICE)
    return value


def _request(row: dict[str, Any], path: Path, line: int) -> Request:
    length = int(_number(row, "input_length", path, line, 1))
    answer = max(1, int(_number(row, "output_length", path, line, 0)))
    at = _number(row, "timestamp", path, line, 0)
    hashes = row.get("hash_ids")
    if not isinstance(hashes, list) or not all(type(h) is int and 0 <= h <= MAX_ID for h in hashes):
        raise bad(path, line, "hash_ids is not a list of whole numbers from 0 on", ADVICE)
    if len(hashes) != -(-length // BLOCK_TOKENS):
        what = f"{len(hashes)} hash_ids for {length} tokens"
        raise bad(path, line, what, f"one is needed for each {BLOCK_TOKENS} tokens, the last part included")
    last = length - BLOCK_TOKENS * (len(hashes) - 1)
    sizes = [BLOCK_TOKENS] * (len(hashes) - 1) + [last]
    # Hashes count from 0, so negative ids are free for answers.
    return at, tuple(map(Piece, hashes, sizes)), Piece(-line, answer)


def sessions(path: Path) -> Iterator[tuple[Session, None]]:
    """The sessions in order of their first arrival, without adapters; holds the trace in memory.

    ``at`` in seconds after the first request. Raises :class:`WorkloadError` on the first bad line.
    """
    requests = [_request(parse(path, line, text), path, line) for line, text in lines(path)]
    requests.sort(key=lambda request: request[0])
    grouped: dict[tuple[int, ...], list[Request]] = {}
    for number, request in enumerate(requests):
        blocks = request[1]
        key = (blocks[0].id, blocks[1].id) if len(blocks) > 1 else (-1 - number,)
        grouped.setdefault(key, []).append(request)
    first = requests[0][0] if requests else 0
    for number, members in enumerate(grouped.values()):
        turns: list[Turn] = []
        context: tuple[Piece, ...] = ()
        for at, prompt, answer in members:
            keep = common(context, prompt)
            turns.append(Turn(keep, prompt[keep:], answer, at=round((at - first) / 1000, 6)))
            context = (*prompt, answer)
        yield Session(str(number), None, tuple(turns)), None
