"""Mean, spread and paired intervals of a few seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Student's t, 97.5 %, for 1 to 30 degrees of freedom.
_T = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
NO_INTERVAL = "no interval (one seed)"


@dataclass(frozen=True)
class Difference:
    """A method's validation loss minus the reference's, over the seeds that both have.

    Attributes:
        mean: negative: the method is better.
        low: of the 95 % interval of the mean; None with one seed.
        high: likewise.
        seeds: pairs.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def word(self) -> str:
        """What the interval says of the method: ``better``, ``worse``, or ``not worse`` where 0 lies inside it."""
        if self.low is None or self.high is None:
            return NO_INTERVAL
        return "better" if self.high < 0 else "worse" if self.low > 0 else "not worse"


def t_quantile(degrees: int) -> float:
    """Student's t at 97.5 %; beyond the table by Cornish and Fisher's expansion (wrong by less than 1e-4 there)."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / degrees + second / degrees**2


def paired_difference(own: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """The difference over the seeds that both have, with its 95 % t-interval; None where they share none.

    Args:
        own: seed -> validation loss of the method.
        reference: likewise.
    """
    pairs = [own[seed] - reference[seed] for seed in own if seed in reference]
    if not pairs:
        return None
    mean = statistics.fmean(pairs)
    if len(pairs) == 1:
        return Difference(mean, None, None, 1)
    half = t_quantile(len(pairs) - 1) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return Difference(mean, mean - half, mean + half, len(pairs))


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, which one value doesn't have."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
