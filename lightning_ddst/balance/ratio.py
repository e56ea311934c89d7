"""The balance ratio over a window of measurements."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_ddst.utils.states import COUNT, Form, Leaf

Estimator = Literal["ratio_of_means", "mean_of_ratios"]
ESTIMATORS = ("ratio_of_means", "mean_of_ratios")

_CLEARLY = 2.0
"""Number of standard errors by which the mean of alpha must exceed 0."""
_MISSING = float("inf")
"""Mean sign, which else is in [-1, 1], in place of a measurement at which the discriminator was not used."""
_ROUNDING = 1e-5
"""Relative deviation up to which mean scores count as equal."""


@dataclass(frozen=True)
class Balance:
    """The balance over a window; every mean is over the window's measurements, NaN without any.

    D is the discriminator's score, G_pre and G_post are the generator before and after one of its updates (DDST,
    section on the balance ratio).

    Attributes:
        ratio: The balance ratio, ``beta / alpha``; None while it is undecided.
        alpha: ``E[D(x)] - E[D(G_pre(z))]``, the gap between the scores of real images and fakes.
        beta: ``E[D(G_post(z))] - E[D(G_pre(z))]``, the part of the gap that one generator update closes.
        real: ``E[D(x)]``.
        fake: ``E[D(G_pre(z))]``.
        samples: Number of measurements.
        reason: The reason why the ratio is undecided; empty if it is decided.
        scores_are_constant: Whether every measurement gave real images and both kinds of fakes the same score.
        real_sign: ``E[sign(D(x))]``, in [-1, 1]: the share of real images with a positive score minus the share with
            a negative score.
    """

    ratio: float | None
    alpha: float
    beta: float
    real: float
    fake: float
    samples: int
    reason: str
    scores_are_constant: bool = False
    real_sign: float = float("nan")

    @property
    def at_chance(self) -> bool:
        """Whether the ratio is undecided although something was measured and all means are finite.

        The discriminator does not clearly tell real from fake, or a mean of ratios has one with ``alpha = 0``.
        """
        return self.ratio is None and self.samples > 0 and math.isfinite(self.alpha) and math.isfinite(self.beta)


class BalanceWindow:
    """A window of the last measurements, from which control signals are computed.

    Measurements stay on their device, so adding one does not wait for it.

    Args:
        size: Number of measurements to keep, at least 1.
        estimator: "ratio_of_means" (robust) or "mean_of_ratios" (the paper's: the mean of ``beta / alpha`` over
            measurements, which a single alpha near 0 can spoil).
    """

    state_form: ClassVar[Form] = {
        "samples": Leaf(
            "a tensor of floating-point numbers of shape (n, 4)",
            lambda value: value.is_floating_point() and value.dim() == 2 and len(value) > 0 and value.shape[1] == 4,
        ),
        "added": COUNT,
    }
    """The form of `state_dict`."""

    def __init__(self, size: int, estimator: Estimator = "ratio_of_means") -> None:
        self._samples = torch.full((size, 4), float("nan"))
        self._added = 0
        self._estimator = estimator

    def resize(self, size: int) -> None:
        """Changes the number of measurements to keep; the last ones stay."""
        if size == len(self._samples):
            return
        count = min(self._added, len(self._samples))
        ordered = self._samples[:count].roll(-(self._added % len(self._samples)) if self._added > count else 0, 0)
        kept = ordered[-size:]
        self._samples = kept.new_full((size, 4), float("nan"))
        self._samples[: len(kept)] = kept
        self._added = len(kept)

    def add(self, measurement: Tensor) -> None:
        """Adds a measurement.

        Args:
            measurement: ``(4,)``: mean scores of real images, of fakes before and of fakes after the generator's
                update, and the mean sign of the scores of real images.
        """
        self._samples = self._samples.to(measurement.device, measurement.dtype)
        self._samples[self._added % len(self._samples)] = measurement.detach()
        self._added += 1

    def add_missing(self) -> None:
        """Takes the place of a measurement at which the discriminator was not used, so that older ones leave."""
        if self._added:
            self.add(self._samples.new_full((4,), _MISSING))

    def read(self) -> Balance:
        """Computes the balance over the window; waits for the device."""
        measured = self._samples[: min(self._added, len(self._samples))].double().cpu()
        measured = measured[measured[:, 3] != _MISSING]
        count = len(measured)
        real, fake, fake_after, real_sign = measured.unbind(1)
        alpha, beta = real - fake, fake_after - fake
        ratio, reason = None, self._undecided(alpha, beta)
        if not reason:
            ratio = float(beta.mean() / alpha.mean() if self._estimator == "ratio_of_means" else (beta / alpha).mean())
            if not math.isfinite(ratio):
                ratio, reason = None, "a single measurement has alpha = 0"
        means = (float(alpha.mean()), float(beta.mean()), float(real.mean()), float(fake.mean()))
        rounding = _ROUNDING * real.abs()
        constant = count > 0 and bool((alpha.abs() <= rounding).logical_and(beta.abs() <= rounding).all())
        return Balance(ratio, *means, count, reason, constant, float(real_sign.mean()))

    def _undecided(self, alpha: Tensor, beta: Tensor) -> str:
        if not len(alpha):
            return "nothing was measured" if self._added else "nothing was measured yet"
        if not (alpha.isfinite().all() and beta.isfinite().all()):
            return "a score is not finite"
        error = float(alpha.std() / len(alpha) ** 0.5) if len(alpha) > 1 else 0.0
        mean = float(alpha.mean())
        if mean <= _CLEARLY * error:
            flipped = len(alpha) > 1 and mean < -_CLEARLY * error
            what = "scores real images lower than generated ones" if flipped else "does not clearly tell real from fake"
            hint = "; if low scores mean real, negate them in balance_scores" if flipped else ""
            return f"the discriminator {what}: alpha = {mean:.3g} +- {error:.2g}{hint}"
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Returns the measurements; loads with ``weights_only=True``."""
        return {"samples": self._samples.to("cpu", copy=True), "added": self._added}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state returned by `state_dict`."""
        self._samples, self._added = state["samples"].clone(), state["added"]
