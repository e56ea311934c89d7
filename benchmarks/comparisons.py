"""What rows say: single numbers, and runs of one kind against those of another with the same seeds."""

import math
from collections.abc import Iterable
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student
from studies import UNCONTROLLED

Row = dict[str, Any]


def distance(row: Row) -> float:
    """The Frechet distance at the end."""
    return float(row["distance"][-1][1])


def flops(row: Row) -> float:
    """Training FLOPs over those of dense training; without measuring BR where nothing depends on it."""
    needless = row["run"] in UNCONTROLLED and "measuring" in row
    return float(row["flops"][-1][1]) - (row["measuring"][-1][1] if needless else 0.0)


def mean_density(row: Row) -> float:
    """The discriminator's density, averaged over what was logged."""
    return fmean(value for _, value in row["discriminator_density"])


def of(rows: Iterable[Row], setting: str, run: str, density: float) -> list[Row]:
    """The rows of a cell, by seed."""
    cell = [row for row in rows if (row["setting"], row["run"], row["density"]) == (setting, run, density)]
    return sorted(cell, key=lambda row: int(row["seed"]))


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(fmean(map(math.log, values)))


def pair(row: Row) -> tuple[str, float, int]:
    """What a run has in common with the runs that it is compared with."""
    return row["setting"], row["density"], row["seed"]


class Comparison:
    """Runs of one kind beside those of another, of the same settings, densities and seeds.

    Attributes:
        pairs: How many there are.
        ratio: The geometric mean of the ratios of distances; below 1 the first is better.
        interval: Its 95 % confidence interval, by Student's t on logarithms; None with less than three pairs.
        flops: The geometric mean of the ratios of training FLOPs.
    """

    def __init__(self, ones: Iterable[Row], others: Iterable[Row]) -> None:
        beside = {pair(row): row for row in others}
        self._pairs = [(row, beside[pair(row)]) for row in ones if pair(row) in beside]
        self.pairs = len(self._pairs)
        logs = [math.log(distance(one) / distance(other)) for one, other in self._pairs]
        self.ratio = math.exp(fmean(logs)) if logs else math.nan
        self.interval: tuple[float, float] | None = None
        if len(logs) > 2:
            half = float(student.ppf(0.975, len(logs) - 1)) * stdev(logs) / math.sqrt(len(logs))
            self.interval = math.exp(fmean(logs) - half), math.exp(fmean(logs) + half)

    @property
    def flops(self) -> float:
        return geometric_mean(flops(one) / flops(other) for one, other in self._pairs)

    @property
    def verdict(self) -> str:
        """In words."""
        if self.interval is None:
            return "too few seeds"
        low, high = self.interval
        return "better" if high < 1 else "worse" if low > 1 else "equal within noise"

    def __str__(self) -> str:
        if not self.pairs:
            return "missing"
        span = "" if self.interval is None else f" ({self.interval[0]:.2f} to {self.interval[1]:.2f})"
        return f"x {self.ratio:.2f}{span}, {self.verdict}"
