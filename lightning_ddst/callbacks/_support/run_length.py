"""The number of generator updates that a run will make."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import Trainer


@dataclass(frozen=True)
class _Progress:
    updates: int
    batches: int
    steps: int


class RunLength:
    """An estimate of a run's generator updates from its first two batches with any.

    A GAN decides how many optimizer steps a batch has and which are the generator's, and ``Trainer(max_steps=...)``
    counts all of them. So the rate is observed, not assumed.

    Attributes:
        known: Whether the rate was observed.
        updates: The run's generator updates; None before the rate is known, and if only time limits the run.
    """

    def __init__(self) -> None:
        self.known = False
        self.updates: int | None = None
        self._first: _Progress | None = None

    def observe(self, trainer: Trainer, updates: int) -> None:
        """Observes the end of a training batch, after `updates` generator updates."""
        if self.known or not updates:
            return
        now = _Progress(updates, trainer.fit_loop.total_batch_idx + 1, trainer.global_step)
        if self._first is None:
            self._first = now
        elif now.updates > self._first.updates:
            self.known, self.updates = True, _extrapolated(trainer, self._first, now)

    def state_dict(self) -> dict[str, Any]:
        """Returns the observations; loads with ``weights_only=True``."""
        return {"known": self.known, "updates": self.updates, "first": self._first and asdict(self._first)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state returned by `state_dict`."""
        self.known, self.updates = state["known"], state["updates"]
        self._first = _Progress(**state["first"]) if state["first"] else None


def _extrapolated(trainer: Trainer, first: _Progress, now: _Progress) -> int | None:
    made = now.updates - first.updates
    lengths = []
    if trainer.max_steps > 0 and now.steps > first.steps:
        # Whole periods of the observed pattern, and one more update if the remaining steps reach it.
        periods, rest = divmod(trainer.max_steps - now.steps, now.steps - first.steps)
        lengths.append(now.updates + made * (periods + (rest >= now.batches - first.batches)))
    if (trainer.max_epochs or -1) > 0 and trainer.num_training_batches != float("inf"):
        batches = int((trainer.max_epochs or 0) * trainer.num_training_batches)
        lengths.append(now.updates + (batches - now.batches) * made // (now.batches - first.batches))
    return min(lengths) if lengths else None
