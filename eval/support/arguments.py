"""Types of command-line arguments, for ``argparse``'s ``type=``: lists by comma, shares, and numbers above 0.

Each takes the text and raises :class:`argparse.ArgumentTypeError` with what is wrong, so that a command ends with one
line that names the flag. Defaults may be given as text.
"""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def number(text: str) -> float:
    """At least 0; ``inf`` is one."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def positive(text: str) -> float:
    """A rate or a duration: finite and above 0."""
    value = number(text)
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"must be above 0 and finite, got {text}")
    return value


def share(text: str) -> float:
    """0 to 1."""
    value = number(text)
    if value > 1:
        raise ArgumentTypeError(f"a share lies between 0 and 1, got {text}")
    return value


def count(text: str) -> int:
    """A whole number, at least 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _listed(one: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    return lambda text: tuple(one(part.strip()) for part in text.split(","))


#: Numbers of at least 0, by comma.
numbers = _listed(number)
#: Rates or durations, by comma.
positives = _listed(positive)
#: Whole numbers of at least 1, by comma, as they are given.
counts = _listed(count)


def sizes(text: str) -> tuple[int, ...]:
    """Whole numbers of at least 1, by comma; sorted, each once."""
    return tuple(sorted(set(counts(text))))


def names(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """A type: some of the ``known`` names, by comma, each once."""
    there = tuple(known)

    def chosen(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
        unknown = [name for name in found if name not in there]
        if unknown or not found:
            raise ArgumentTypeError(
                f"there is no {', '.join(unknown) or 'name in it'}; there are: {', '.join(there)}"
            )
        return found

    return chosen
