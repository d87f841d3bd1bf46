"""Seeded draws: a number from a name, lengths and times with a long tail, numbers of turns."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from hashlib import blake2b
from statistics import NormalDist

from elora_sglang.eval.workloads.model import WorkloadError


def uniform(*name: object) -> float:
    """A number in [0, 1) that depends on ``name`` only, whatever was drawn before."""
    digest = blake2b("/".join(map(str, name)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def geometric(rng: random.Random, mean: float) -> int:
    """A whole number from 1 on with this mean; ``rng`` moves on by one draw."""
    draw = rng.random()
    return 1 if mean <= 1 else 1 + int(math.log1p(-draw) / math.log1p(-1 / mean))


@dataclass(frozen=True)
class LogNormal:
    """Values with a long tail: ``sigma`` is the standard deviation of the logarithm, ``most`` cuts the tail.

    ``mean`` is the mean *with* the cut. Raises :class:`WorkloadError` if there is no such distribution.
    """

    mean: float
    sigma: float
    most: float
    _mu: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (0 < self.mean < self.most and self.sigma >= 0):
            raise WorkloadError(
                f"no values with mean {self.mean:g}, at most {self.most:g} and sigma {self.sigma:g}: give a mean "
                "above 0 and below the most, and a sigma of at least 0"
            )
        object.__setattr__(self, "_mu", self._solve())

    def _mean_of(self, mu: float) -> float:
        """E[min(X, most)] for log X normal with ``mu`` and ``sigma``."""
        if not self.sigma:
            return min(math.exp(mu), self.most)
        normal = NormalDist()
        z = (math.log(self.most) - mu) / self.sigma
        whole = math.exp(mu + self.sigma**2 / 2) * normal.cdf(z - self.sigma)
        return whole + self.most * (1 - normal.cdf(z))

    def _solve(self) -> float:
        low = (
            math.log(self.mean) - self.sigma**2 / 2 - 1e-9
        )  # the answer without a cut: the cut asks for more
        high = math.log(self.most) + 8 * self.sigma
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._mean_of(middle) < self.mean else (low, middle)
        return (low + high) / 2

    def draw(self, rng: random.Random) -> float:
        """One value; ``rng`` moves on."""
        return min(self.most, math.exp(rng.normalvariate(self._mu, self.sigma)))

    def tokens(self, rng: random.Random) -> int:
        """One value as a length in tokens, at least 1; ``rng`` moves on."""
        return max(1, round(self.draw(rng)))
