"""Block ids against the tokens they stand for."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

import pytest
from support.workload_samples import prompt, session, spelled

from elora_sglang.eval.workloads.blocks import BlockKeys
from elora_sglang.eval.workloads.model import Piece, prompts, tokens


def blocks(pieces: Sequence[Piece], size: int) -> list[tuple[tuple[int, int], ...]]:
    """The full blocks of a prompt, token by token."""
    every = spelled(pieces)
    return [tuple(every[at : at + size]) for at in range(0, len(every) - size + 1, size)]


@pytest.mark.parametrize("seed", range(8))
def test_ids_are_equal_exactly_where_the_tokens_are(seed: int) -> None:
    rng = random.Random(f"blocks/{seed}")  # the seed is in the test's name
    size = rng.choice([1, 2, 3, 5, 8, 16])
    keys = BlockKeys(size)
    id_of: dict[tuple[tuple[int, int], ...], int] = {}
    compared = repeated = 0
    for _ in range(300):
        pieces = prompt(rng, 6, 4 * size, ids=4)
        found, expected = keys.keys(pieces), blocks(pieces, size)
        assert len(found) == len(expected)
        for key, block in zip(found, expected, strict=True):
            compared += 1
            repeated += block in id_of
            assert id_of.setdefault(block, key) == key, (seed, size, block)
    assert len(set(id_of.values())) == len(id_of), (seed, size)
    assert repeated > compared / 20, "the prompts must share blocks, or nothing was compared"


def test_the_inside_of_a_long_piece_depends_on_where_it_begins_in_a_block() -> None:
    keys = BlockKeys(16)
    long = Piece(7, 16 * 50)
    straight = keys.keys((long,))
    shifted = keys.keys((Piece(8, 3), long))
    by_a_block = keys.keys((Piece(8, 16), long))
    assert len(set(straight)) == 50
    assert not set(straight) & set(shifted)
    assert by_a_block[1:] == straight


@pytest.mark.parametrize("seed", range(8))
def test_extending_gives_what_hashing_all_gives(seed: int) -> None:
    rng = random.Random(f"extend/{seed}")
    size = rng.choice([1, 3, 8])
    keys = BlockKeys(size)
    for _ in range(200):
        shared = prompt(rng, 5, 3 * size, ids=4)
        old, new = (*shared, *prompt(rng, 3, 20, 4)), (*shared, *prompt(rng, 3, 20, 4))
        known = keys.keys(old, partial=rng.random() < 0.5)
        before = known[:]
        agreed = rng.randint(0, tokens(shared))
        partial = rng.random() < 0.5
        assert keys.extend(known, agreed, new, partial=partial) == keys.keys(new, partial=partial)
        assert known == before, "what was given must not change"


def test_extending_trusts_what_is_known_and_hashes_only_the_rest() -> None:
    keys = BlockKeys(4)
    marked = array("q", [-1, -2, -3])
    assert keys.extend(marked, 11, (Piece(1, 40),))[:2] == marked[:2]
    assert keys.extend(marked, 11, (Piece(1, 40),))[2:] == keys.keys((Piece(1, 40),))[2:]


def test_the_partial_block_counts_with_its_length() -> None:
    keys = BlockKeys(8)
    one, other = keys.keys((Piece(1, 13),), partial=True), keys.keys((Piece(1, 14),), partial=True)
    assert len(one) == len(other) == 2
    assert one[0] == other[0]
    assert one[1] != other[1]
    assert one[1] != keys.keys((Piece(1, 16),))[1]
    assert len(keys.keys((Piece(1, 16),), partial=True)) == 2, "no empty block at the end"


def test_a_small_memo_changes_nothing_and_ids_do_not_depend_on_the_process() -> None:
    rng = random.Random("memo")
    many = [prompt(rng, 6, 40, ids=1000) for _ in range(200)]
    small, large = BlockKeys(8, memo=2), BlockKeys(8)
    assert [small.keys(pieces) for pieces in many] == [large.keys(pieces) for pieces in many]
    assert len(small._starts) <= 2
    # Pinned: saved results are compared across machines and versions.
    assert list(BlockKeys(4).keys((Piece(5, 9), Piece(-3, 3)))) == PINNED


PINNED = [2417166979079911965, 2417167658615468956, 2656191171171333859]


def test_ids_fit_into_63_bits_whatever_the_pieces_are() -> None:
    keys = BlockKeys(1)
    for number in (-(2**63), -1, 0, 2**63 - 1):
        assert all(0 <= key < 2**63 for key in keys.keys((Piece(number, 100_000),)))
    with pytest.raises(ValueError, match="too long"):
        keys.keys((Piece(1, 1 << 22),))


@pytest.mark.parametrize("seed", range(5))
def test_turns_of_a_session(seed: int) -> None:
    rng = random.Random(f"turns/{seed}")
    keys = BlockKeys(4)
    for number in range(100):
        one = session(rng, str(number), 0.0)
        for (prompt_keys, context_keys), (pieces, answer) in zip(keys.turns(one), prompts(one), strict=True):
            assert prompt_keys == keys.keys(pieces)
            assert context_keys == keys.keys((*pieces, answer))


def test_a_block_has_tokens() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BlockKeys(0)
