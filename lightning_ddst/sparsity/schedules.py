"""How the exploration rate falls over a run."""

import math
from collections.abc import Callable

from lightning_ddst.utils.validation import check_choice

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}
"""Factor on the exploration rate by progress through the run, 0 at its start and 1 at its end.

"cosine" is that of Dettmers and Zettlemoyer (2019) and RigL (Evci et al. 2020), annealed to zero at the end.
"""


def exploration_rate(initial: float, schedule: str, progress: float) -> float:
    """The share of active weights to explore now.

    Args:
        initial: The rate at the start, in [0, 1].
        schedule: A key of `SCHEDULES`.
        progress: Share of the run that is done; clipped to [0, 1].

    Returns:
        A rate in [0, initial].

    Raises:
        ValueError: If the schedule is unknown.
    """
    check_choice("schedule", schedule, SCHEDULES)
    return initial * SCHEDULES[schedule](min(max(progress, 0.0), 1.0))
