"""Reports of a run: scalars, reasons of decisions, and warnings."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from lightning.fabric.utilities import rank_zero_info

from lightning_ddst.attached.checks import check_unchanged
from lightning_ddst.attached.hooks import AttachedTraining
from lightning_ddst.attached.options import RunOptions
from lightning_ddst.balance import Decision
from lightning_ddst.balance.controller import ACTIONS
from lightning_ddst.utils import distributed
from lightning_ddst.utils.series import RecordedSeries

_DRAWN = (
    *("balance/ratio", "balance/real_sign", "control/signal", "control/lower", "control/upper"),
    *("density/generator", "density/discriminator"),
)
"""Names of the values that are kept for a figure of the run."""
_WARN_AFTER, _WARN_WINDOW = 7, 10
"""A warning follows if this many of the last decisions would have pruned D at its minimum density."""


def new_series() -> RecordedSeries:
    """Returns empty series of the values in a figure of the run."""
    return RecordedSeries(_find_drawn)


def _find_drawn(name: str) -> str | None:
    return "run" if name in _DRAWN else None


class RunReport(ABC):
    """A reporter of the sparse training of one pair of networks; subclasses define where to.

    Args:
        options: The options of the run.
        attached: The training.
        series: Series that record what is logged.
        stops: Whether the run ends when training has broken down.
    """

    def __init__(self, options: RunOptions, attached: AttachedTraining, series: RecordedSeries, *, stops: bool) -> None:
        self._series = series
        self._verbose = options.verbose
        self._pair = attached.pair
        self._training = attached.training
        self._measured = options.measured
        self._stops = stops
        self._decisions = len(self._training.decisions)
        self._divergences = len(self._training.divergence.reports)
        self._warned = self._told_of_unused = False

    @abstractmethod
    def line_is_due(self, update: int) -> bool:
        """Returns whether scalars are logged at this generator update, decisions aside."""

    @abstractmethod
    def log(self, values: Mapping[str, float], update: int) -> None:
        """Logs scalars by name, after a number of generator updates."""

    @abstractmethod
    def stop(self) -> None:
        """Ends the run."""

    @abstractmethod
    def print(self, text: str) -> None:
        """Prints a text in the first process, while training runs."""

    def write(self, name: str, text: str, update: int) -> None:  # noqa: B027 -- most logs take no text
        """Writes a text."""

    def after_update(self) -> None:
        """Logs a generator update if logging is due or a decision was made, and warns about problems."""
        training = self._training
        line_is_due = self.line_is_due(training.updates)
        if line_is_due:
            training.divergence.finite(training.updates)
        self._warn_of_divergence()
        self._tell_of_unused_discriminator()
        new, self._decisions = training.decisions[self._decisions :], len(training.decisions)
        if not new and not line_is_due:
            return
        values = self.scalars()
        self._series.record(values, training.updates)
        self.log(values, training.updates)
        for update, decision in new:
            if self._verbose:
                self.print(describe_decision(update, decision))
            self.write("decision/reason", f"{decision.action}: {decision.reason}", update)
        if new and not self._warned:
            self._warn_of_bounds()

    def after_run(self) -> None:
        """Warns if the discriminator was never used, or weights have changed otherwise than by training."""
        try:
            check_unchanged(self._pair)
        except RuntimeError as error:
            distributed.warn(f"after the last training step: {error}")
        if self._training.updates and not self._training.discriminator_used:
            distributed.warn(
                f"the discriminator was neither called nor trained in {self._training.updates} generator updates, so "
                "the balance ratio was never measured, and nothing was decided by it."
            )

    def scalars(self) -> dict[str, float]:
        """Returns the current scalars by name."""
        training = self._training
        values: dict[str, float] = {}
        if self._measured and (balance := training.balance).samples:
            parts = ("alpha", "beta", "real", "fake", "real_sign")
            values |= {f"balance/{part}": getattr(balance, part) for part in parts}
            if balance.ratio is not None:
                values["balance/ratio"] = balance.ratio
            for update in training.mask_updates:
                values |= update.readings(training)
        for role, network in self._pair.networks.items():
            values[f"density/{role}"] = network.density
            values[f"density/{role}_target"] = network.target
            values |= {f"coverage/{role}": network.coverage, f"overlap/{role}": network.overlap}
            densities = self._pair.layer_densities(role)
            values |= {f"layer_density/{name}": density for name, density in densities.items()}
        if any(update.resizes for update in training.mask_updates):
            actions = [decision.action for _, decision in training.decisions]
            values |= {f"decision/{action}": float(actions.count(action)) for action in ACTIONS}
        if (flops := training.flops.total).dense:
            values |= {"flops/training_ratio": flops.ratio, "flops/measuring_ratio": flops.probes / flops.dense}
        return values

    def _warn_of_divergence(self) -> None:
        reports = self._training.divergence.reports
        new, self._divergences = reports[self._divergences :], len(reports)
        for update, message in new:
            if self._stops:
                self.stop()
            distributed.warn(f"at generator update {update}: {message}{' The run stops.' if self._stops else ''}")
            self.write("divergence", message, update)

    def _tell_of_unused_discriminator(self) -> None:
        if self._told_of_unused or self._training.discriminator_used:
            return
        self._told_of_unused = True
        rank_zero_info(
            "lightning_ddst: the generator is trained without the discriminator so far, so the balance ratio is "
            "undecided; measuring starts when the discriminator is called or trained."
        )

    def _warn_of_bounds(self) -> None:
        last = self._training.decisions[-_WARN_WINDOW:]
        at_floor = [(update, decision.reason) for update, decision in last if decision.at_floor]
        if len(at_floor) < _WARN_AFTER:
            return
        self._warned = True
        update, reason = at_floor[-1]
        distributed.warn(
            f"at generator update {update}: {reason}; so it was in {len(at_floor)} of the last {_WARN_WINDOW} "
            "decisions. If the signal stays on one side of its bounds at any density of the discriminator, the bounds "
            'do not fit the GAN and keep the discriminator too sparse to learn. bounds="auto" and method="ramp" do not '
            "depend on the signal's level."
        )


def describe_decision(update: int, decision: Decision) -> str:
    """Returns a line about a decision, such as "update 600: grow to 15.0%, since BR 0.600 > 0.55: ..."."""
    where = "to" if decision.action in ("grow", "prune") else "at"
    return f"update {update:,}: {decision.action} {where} {decision.density:.1%}, since {decision.reason}"
