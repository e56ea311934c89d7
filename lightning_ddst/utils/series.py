"""Series of logged values, kept in memory at a bounded size."""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

RecordedPoints: TypeAlias = list[tuple[int, float]]
"""Pairs of generator updates and a value."""

_MOST_POINTS = 2000


class RecordedSeries:
    """Series of values over generator updates; each keeps at most 2,000 points, and is thinned out evenly.

    Args:
        find_source: Function from a name to an identifier that is equal for values logged together, which stay at the
            same updates; None leaves a value out.
        points: Points by name, to begin with.
    """

    def __init__(
        self,
        find_source: Callable[[str], str | None],
        points: Mapping[str, Iterable[tuple[int, float]]] | None = None,
    ) -> None:
        self._find_source = find_source
        self.points: dict[str, RecordedPoints] = {name: list(own) for name, own in (points or {}).items()}

    def record(self, values: Mapping[str, float], updates: int) -> None:
        """Records values by name, after a number of generator updates; replaces earlier ones of the same update."""
        for name, value in values.items():
            if (source := self._find_source(name)) is not None:
                points = self.points.setdefault(name, [])
                if points and points[-1][0] == updates:
                    points.pop()
                points.append((updates, float(value)))
                if len(points) > _MOST_POINTS:
                    self._thin_out(source)

    def _thin_out(self, source: str) -> None:
        """Reduces series that are logged together to about half the allowed points, at the same updates."""
        together = {name: points for name, points in self.points.items() if self._find_source(name) == source}
        updates = sorted({update for points in together.values() for update, _ in points})
        width = (updates[-1] - updates[0]) / (_MOST_POINTS // 2)
        last_of_each = {int((update - updates[0]) / width): update for update in updates}
        kept = {updates[0], *last_of_each.values()}
        for name, points in together.items():
            self.points[name] = [point for point in points if point[0] in kept]
