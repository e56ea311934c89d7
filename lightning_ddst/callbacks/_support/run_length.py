"""The length of a run in generator updates, as the Trainer's progress tells it."""

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from typing import Any, ClassVar

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from lightning_ddst.utils import distributed
from lightning_ddst.utils.lightning_packages import is_a
from lightning_ddst.utils.states import COUNT, FLAG, SECONDS, Form, maybe

_CORRECTED_BEYOND = 0.1
"""Relative change of the length beyond which default intervals are derived anew."""
_ASKED_EVERY = 50
"""Several processes agree on the length again after a 50th more generator updates; each time costs a broadcast."""


@dataclass(frozen=True)
class _Progress:
    updates: int
    batches: int
    steps: int
    seconds: float

    def minus(self, other: "_Progress") -> "_Progress":
        """Returns the difference to another point."""
        ours, others = astuple(self), astuple(other)
        return _Progress(*(a - b for a, b in zip(ours, others, strict=True)))


class RunLength:
    """Estimates a run's generator updates after every batch with one.

    A GAN decides by itself how many optimizer steps a batch has and which are the generator's, and may change that
    during the run; ``Trainer(max_steps=...)`` counts all steps. So the rate of generator updates over the last half of
    them is extrapolated to the limit that the Trainer reaches first: max_epochs, max_steps or max_time. Towards the
    end of the run the estimate is exact, whatever the rates were. The first process decides for all.

    Args:
        earlier: The length of an earlier fit that this one continues: it has the same rate at first.

    Attributes:
        known: Whether a rate was seen.
        updates: The run's generator updates; None if nothing that the Trainer counts limits the run.
        reference: The length that default intervals are derived from: an estimate that `updates` has not left by more
            than a tenth since.
    """

    state_form: ClassVar[Form] = {
        "known": FLAG,
        "updates": maybe(COUNT),
        "reference": maybe(COUNT),
        **dict.fromkeys(
            ("since", "middle", "last"),
            maybe({"updates": COUNT, "batches": COUNT, "steps": COUNT, "seconds": SECONDS}),
        ),
        "ask_at": COUNT,
    }
    """The form of `state_dict`."""

    def __init__(self, earlier: "RunLength | None" = None) -> None:
        self.known = False
        self.updates: int | None = None
        self.reference: int | None = None
        self._since: _Progress | None = None  # the rate is that since then
        self._middle: _Progress | None = None
        self._last: _Progress | None = None  # the last observation
        self._earlier = None if earlier is None else earlier._rate()
        self._ask_at = 0

    def _rate(self) -> tuple[_Progress, _Progress] | None:
        """Returns two points with updates between them, of an earlier fit if this one had too few."""
        if self._since is None or self._last is None or self._since.updates == self._last.updates:
            return self._earlier
        return self._since, self._last

    def observe(self, trainer: Trainer, updates: int) -> bool:
        """Observes the end of a training batch after `updates` generator updates.

        Returns:
            Whether the length became known or changed.
        """
        if updates == (self._last.updates if self._last else 0):
            return False  # a batch without a generator update
        now = self._last = _measure_progress(trainer, updates)
        if self._since is None or self._middle is None:
            self._since = self._middle = now
            return False
        if now.updates >= 2 * self._middle.updates:
            self._since, self._middle = self._middle, now
        return now.updates >= self._ask_at and self._estimate(trainer, self._since, now, trainer.fit_loop.batch_idx + 1)

    def begin(self, trainer: Trainer) -> bool:
        """Estimates the length before the first batch, of a fit that continues another or resumes a run.

        The Trainer may have other limits than the earlier one.

        Returns:
            Whether the length became known or changed.
        """
        loop = trainer.fit_loop
        if self._earlier is not None:
            since, last = self._earlier
            if find_timer(trainer) is not None and last.seconds <= since.seconds:
                return False  # the earlier fit was not timed
            now = self._last = _measure_progress(trainer, last.updates)
            return self._estimate(trainer, now.minus(last.minus(since)), now, 0)
        if not self.known or self._since is None or self._last is None:
            return False
        is_under_way = loop.epoch_progress.current.ready > trainer.current_epoch
        done = loop.batch_idx + 1 if is_under_way else 0
        done -= loop.total_batch_idx + 1 - self._last.batches  # batches without a generator update came after it
        return self._estimate(trainer, self._since, self._last, done)

    def _estimate(self, trainer: Trainer, since: _Progress, now: _Progress, done: int) -> bool:
        estimate = _extrapolate(trainer, since, now, done)
        if distributed.is_distributed():
            self._ask_at = now.updates + now.updates // _ASKED_EVERY
            estimate = distributed.broadcast(estimate)
        changed = not self.known or estimate != self.updates
        self.known, self.updates = True, estimate
        if (
            estimate is None
            or self.reference is None
            or abs(estimate - self.reference) > _CORRECTED_BEYOND * self.reference
        ):
            self.reference = estimate
        return changed

    def state_dict(self) -> dict[str, Any]:
        """Returns the estimate and what it is made from; loads with ``weights_only=True``."""
        held = {"since": self._since, "middle": self._middle, "last": self._last}
        points = {name: point and asdict(point) for name, point in held.items()}
        lengths = {"known": self.known, "updates": self.updates, "reference": self.reference}
        return lengths | points | {"ask_at": self._ask_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state returned by `state_dict`."""
        self.known, self.updates, self.reference = state["known"], state["updates"], state["reference"]
        points = (_Progress(**state[name]) if state[name] else None for name in ("since", "middle", "last"))
        self._since, self._middle, self._last = points
        self._ask_at = state["ask_at"]


def find_timer(trainer: Trainer) -> Timer | None:
    """Returns the callback that ends a run after ``Trainer(max_time=...)``; None without."""
    return next((c for c in trainer.callbacks if is_a(c, "Timer")), None)  # type: ignore[attr-defined]


def explain_unknown(trainer: Trainer) -> str:
    """Returns a sentence that explains why a run's length is unknown, without a full stop."""
    if (trainer.max_epochs or -1) > 0:
        return (
            f"max_epochs={trainer.max_epochs} limits this run, but its train loader has no length, so the run's length "
            "in generator updates is unknown (Trainer(limit_train_batches=...), an integer, would tell it)"
        )
    return "none of max_epochs, max_steps and max_time limits this run, so its length in generator updates is unknown"


def _measure_progress(trainer: Trainer, updates: int) -> _Progress:
    timer = find_timer(trainer)
    seconds = 0.0 if timer is None else timer.time_elapsed()
    return _Progress(updates, trainer.fit_loop.total_batch_idx + 1, trainer.global_step, seconds)


def _extrapolate(trainer: Trainer, since: _Progress, now: _Progress, done: int) -> int | None:
    """Returns the number of generator updates at the limit that is reached first; None without a limit.

    Args:
        trainer: The Trainer.
        since: The observation since which the rate counts.
        now: The last observation.
        done: Number of batches of the current epoch at that observation. Those of earlier epochs do not count: their
            loaders may have had another batch size, or ended early.
    """
    made = now.updates - since.updates
    lengths = []
    if trainer.max_steps > 0 and now.steps > since.steps:
        periods, rest = divmod((trainer.max_steps - now.steps) * made, now.steps - since.steps)
        # The last period's generator update is made if the rest of the steps reaches it.
        lengths.append(now.updates + periods + (rest >= now.batches - since.batches))
    if (trainer.max_epochs or -1) > 0 and trainer.num_training_batches != float("inf"):
        batches = int(trainer.num_training_batches)
        left = ((trainer.max_epochs or 0) - trainer.current_epoch) * batches - min(done, batches)
        lengths.append(now.updates + left * made // max(now.batches - since.batches, 1))
    timer = find_timer(trainer)
    seconds_left = None if timer is None else timer.time_remaining()
    if seconds_left is not None and now.seconds > since.seconds:
        lengths.append(now.updates + int(seconds_left * made / (now.seconds - since.seconds)))
    return max(now.updates, min(lengths)) if lengths else None
