"""Reads numbers from rows, and compares two kinds of runs with the same seeds."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

from rows import rows as rows_of
from scipy.stats import t as student
from studies import UNCONTROLLED, WIDE

Row = dict[str, Any]


def distance(row: Row) -> float:
    """The Frechet distance at the end."""
    return float(row["distance"][-1][1])


def flops(row: Row) -> float:
    """Training FLOPs over those of dense training; without measuring BR where nothing depends on it."""
    return without_measuring(row) if row["run"].startswith(UNCONTROLLED) else float(row["flops"][-1][1])


def without_measuring(row: Row) -> float:
    """Training FLOPs over those of dense training, without measuring BR."""
    return float(row["flops"][-1][1] - (row["measuring"][-1][1] if "measuring" in row else 0.0))


def failed(row: Row) -> bool:
    """Whether a run failed: its samples are hardly images."""
    return distance(row) > _FAILED


def mean_density(row: Row) -> float:
    """The discriminator's density, averaged over what was logged."""
    return fmean(value for _, value in row["discriminator_density"])


def settled(row: Row) -> list[float]:
    """BR of a run's windows after its first 500 updates."""
    return [value for update, value in row["balance_ratio"] if update > 500]


def of(rows: Iterable[Row], setting: str, run: str, density: float) -> list[Row]:
    """The rows of a cell, by seed."""
    cell = [row for row in rows if (row["setting"], row["run"], row["density"]) == (setting, run, density)]
    return sorted(cell, key=lambda row: int(row["seed"]))


def repeated_densities(rows: Iterable[Row], setting: str) -> list[float]:
    """The densities of sparse generators of which a setting has a kind of run with several seeds, in order."""
    seeds = Counter((row["density"], row["run"]) for row in rows if row["setting"] == setting and row["density"] < 1)
    return sorted({density for (density, _), number in seeds.items() if number > 1})


def of_widths() -> list[Row]:
    """Returns the rows of all widths, with settings "width 6", ...; width 24 is from the study "wide"."""
    setting = next(iter(WIDE))
    wide = [row | {"setting": "width 24"} for row in rows_of("wide") if row["setting"] == setting]
    return [*rows_of("scaling"), *wide]


def of_run(rows: Iterable[Row], run: str) -> list[Row]:
    """The rows of one kind of run, in whatever cell."""
    return [row for row in rows if row["run"] == run]


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(fmean(map(math.log, values)))


def interval(logs: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the geometric mean of what the logarithms are of, by Student's t."""
    half = float(student.ppf(0.975, len(logs) - 1)) * stdev(logs) / math.sqrt(len(logs))
    return math.exp(fmean(logs) - half), math.exp(fmean(logs) + half)


def place(row: Row) -> tuple[str, float]:
    """The cell that a run is in: what it was trained on, and the generator's density."""
    return row["setting"], row["density"]


_FAILED = 100
"""The distance above which a run counts as failed."""
_WIDE = 1.5
"""A factor either way, that an interval has to exclude to say anything."""


class Comparison:
    """Runs of one kind beside those of another, paired by cell and seed.

    Args:
        ones: Rows of one kind.
        others: Those of the other.
        by_seed: Whether the pairs of several cells are averaged by seed, where a seed has all of them, and not by cell.

    Attributes:
        pairs: How many there are.
        cells: In how many cells.
        ratio: The geometric mean of the ratios of distances; below 1 the first is better. Of several cells it is the
            mean of their means, so each counts as much.
        interval: Its 95 % confidence interval: of the seeds of one cell, or of the means of several (the same seeds in
            like cells are not independent), by cell or by seed. None with less than three.
    """

    def __init__(self, ones: Iterable[Row], others: Iterable[Row], by_seed: bool = False) -> None:
        beside = {(place(row), row["seed"]): row for row in others}
        pairs = [(row, other) for row in ones if (other := beside.get((place(row), row["seed"])))]
        self._by_seed = by_seed
        self.cells = len({place(row) for row, _ in pairs})
        self._groups: dict[Any, list[tuple[Row, Row]]] = {}
        for row, other in pairs:
            self._groups.setdefault(row["seed"] if by_seed else place(row), []).append((row, other))
        if by_seed:
            self._groups = {seed: group for seed, group in self._groups.items() if len(group) == self.cells}
        self.pairs = sum(map(len, self._groups.values()))
        logs = self._logs(distance)
        values = [fmean(group) for group in logs] if len(logs) > 1 else [value for group in logs for value in group]
        self.ratio = self.ratio_of(distance) if values else math.nan
        self.interval = interval(values) if len(values) > 2 else None

    def _logs(self, measure: Callable[[Row], float]) -> list[list[float]]:
        """Cell by cell, or seed by seed, the logarithms of the ratios."""
        return [[math.log(measure(one) / measure(other)) for one, other in pairs] for pairs in self._groups.values()]

    def ratio_of(self, measure: Callable[[Row], float]) -> float:
        """The same mean of the ratios of something else."""
        return math.exp(fmean(map(fmean, self._logs(measure))))

    @property
    def verdict(self) -> str:
        """The result in words."""
        if self.interval is None:
            return "too few cells" if self.cells > 1 and not self._by_seed else "too few seeds"
        low, high = self.interval
        if high < 1:
            return "better"
        if low > 1:
            return "worse"
        return f"within a factor of {_WIDE}" if low > 1 / _WIDE and high < _WIDE else "not told apart"

    def __str__(self) -> str:
        if not self.pairs:
            return "missing"
        span = "" if self.interval is None else f" ({self.interval[0]:.2f} to {self.interval[1]:.2f})"
        return f"x {self.ratio:.2f}{span}, {self.verdict}"
