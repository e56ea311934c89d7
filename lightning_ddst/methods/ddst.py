"""Double dynamic sparse training (DDST, also called ADAPT): feedback from the balance ratio."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, cast

from lightning_ddst.balance import SIGNALS, Controller, DensityController, RelativeController
from lightning_ddst.methods.base import MaskUpdate, Role, training_method
from lightning_ddst.methods.ramp import Resize, ResizingMethod

_REPLACED_BY_CONTROLLER = ("signal", "bounds", "delta", "min_discriminator_density", "max_discriminator_density")


class ResizeByBalance(Resize):
    """A mask update that resizes the discriminator by a window of measurements of its strength (DDA)."""

    decides: ClassVar[bool] = True


@training_method("ddst")
@dataclass(frozen=True, kw_only=True)
class DDST(ResizingMethod):
    """Double dynamic sparse training: the generator explores, the discriminator is resized by the balance ratio.

    "Double Dynamic Sparse Training for GANs" (2022); "Balanced Training for Sparse GANs" (NeurIPS 2023, arXiv
    2302.14670, there called ADAPT).

    Args:
        signal: Signal that controls the discriminator's density, a key of `lightning_ddst.balance.SIGNALS`.
        bounds: Lower and upper bound of the signal. "auto", the default with the balance ratio, takes shares of its
            highest value so far; the paper's bounds are 0.45 and 0.55. Other signals have default bounds of their own.
        delta: Density that a decision adds or removes, in (0, 1]. By default a decision with bounds "auto" adds at most
            the step of a straight line from the lower limit to the upper over the run; with two numbers it is 0.05, the
            paper's.
        min_discriminator_density: Lower limit of resizing, in (0, 1]; by default the smaller of the generator's
            density and the discriminator's at the start.
        max_discriminator_density: Upper limit of resizing. 1 is the paper's relaxed setting; below 1, the strict
            one, the discriminator explores at its maximum instead of growing.
        controller: Controller that replaces the arguments above; each run gets a copy.

    Raises:
        ValueError: For an argument outside the allowed range.
    """

    signal: str = "balance_ratio"
    bounds: tuple[float, float] | Literal["auto"] | None = None
    delta: float | None = None
    min_discriminator_density: float | None = None
    controller: Controller | None = None

    needs_balance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the arguments."""
        super().__post_init__()
        SIGNALS.find("signal", self.signal)
        self._check_controller()
        self._make_controller()
        start, lowest = self.initial_densities["discriminator"], self.lowest_densities["discriminator"]
        if start < lowest:
            raise ValueError(f"discriminator_density={start} must not be below min_discriminator_density={lowest}.")

    def _check_controller(self) -> None:
        if self.controller is None:
            return
        if not isinstance(self.controller, Controller):
            raise ValueError(f"controller={self.controller!r} must be a lightning_ddst.balance.Controller.")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _REPLACED_BY_CONTROLLER and value != field.default:
                raise ValueError(f"{field.name}={value!r}: the given controller has its own.")

    @property
    def final_densities(self) -> dict[Role, float]:
        """The generator's density, and the discriminator's initial density; the balance ratio decides on later ones."""
        return self.initial_densities

    @property
    def lowest_densities(self) -> dict[Role, float]:
        """The generator's density, and the lower limit of the discriminator's density."""
        initial = self.initial_densities
        lowest = self.min_discriminator_density
        return initial | {"discriminator": min(initial.values()) if lowest is None else lowest}

    def _make_controller(self) -> Controller:
        if self.controller is not None:
            return deepcopy(self.controller)  # a controller remembers what it saw
        lowest, highest = self.lowest_densities["discriminator"], self.max_discriminator_density
        bounds = self.bounds
        if bounds is None:
            bounds = "auto" if self.signal == "balance_ratio" else SIGNALS[self.signal].bounds
        if isinstance(bounds, str):
            if bounds != "auto" or self.signal != "balance_ratio":
                other = ' or "auto"' if self.signal == "balance_ratio" else ""
                raise ValueError(f"bounds={bounds!r} with signal={self.signal!r} must be two numbers{other}.")
            return RelativeController((lowest, highest), self.delta)
        return DensityController(
            cast(tuple[float, float], tuple(bounds) if isinstance(bounds, Iterable) else bounds),  # YAML gives a list
            DensityController.delta if self.delta is None else self.delta,
            lowest,
            highest,
            self.signal,
        )

    def mask_updates(self) -> Sequence[MaskUpdate]:
        """Returns the discriminator's resizing and the generator's exploration."""
        return (ResizeByBalance(self._make_controller(), self.drop_fraction), *super().mask_updates())


@training_method("dda")
@dataclass(frozen=True, kw_only=True)
class DDA(DDST):
    """Dynamic density adjustment alone: the discriminator is resized by the balance ratio, the generator is static."""

    def mask_updates(self) -> Sequence[MaskUpdate]:
        """Returns the discriminator's resizing."""
        return super().mask_updates()[:1]
