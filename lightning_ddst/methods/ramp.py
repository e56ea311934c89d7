"""A discriminator whose density rises in a straight line: the baseline of methods with feedback."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lightning_ddst.balance import Controller, Decision, DensityRamp
from lightning_ddst.methods.base import MaskUpdate, Role, training_method
from lightning_ddst.methods.intervals import Plan, is_due
from lightning_ddst.methods.sdst import SDST, DropFractionSchedule
from lightning_ddst.methods.training import SparseTraining
from lightning_ddst.sparsity import MaskedNetwork
from lightning_ddst.utils.validation import check_density


class Resize(MaskUpdate):
    """A mask update that resizes the discriminator by a controller's decisions, every ``plan.interval`` updates.

    Args:
        controller: The controller.
        drop_fraction: The share of active weights to replace when the controller decides to explore.
    """

    roles: tuple[Role, ...] = ("discriminator",)

    def __init__(self, controller: Controller, drop_fraction: DropFractionSchedule) -> None:
        self.controller = controller
        self._drop_fraction = drop_fraction

    def begin(self, training: SparseTraining) -> None:
        """Fills in the default drop fraction."""
        self._drop_fraction = self._drop_fraction.for_network(training.network("discriminator"))

    def due(self, update: int, plan: Plan) -> bool:
        """Returns whether a decision is due: every ``plan.interval`` updates."""
        return is_due(update, plan.interval)

    def describe_plan(self, plan: Plan) -> str:
        """Returns how often the controller decides."""
        return "" if plan.interval is None else f"decision on the discriminator {plan.times(plan.interval)}"

    def apply(self, training: SparseTraining) -> bool:
        """Asks the controller and applies its decision, if the dense gradients that it needs are available."""
        network, plan, balance = training.network("discriminator"), training.plan, training.balance
        if self.due(training.updates, plan):  # not again for a postponed decision
            self.controller.observe(balance)
        share = plan.interval / plan.updates if plan.updates and plan.interval else 0.0
        decision = self.controller.decide(balance, network.target, training.progress, share)
        _check(decision, self.controller, network.target)
        decision = _clip(decision, network)
        gradients = training.dense_gradients("discriminator")
        if decision.action in ("grow", "explore") and gradients is None:
            return False
        if decision.action == "explore":
            network.explore(self._drop_fraction.at(training.progress), gradients)
        elif decision.action in ("grow", "prune"):
            network.resize(decision.density, gradients)
        training.decisions.append((training.updates, decision))
        return True

    def readings(self, training: SparseTraining) -> dict[str, float]:
        """Returns the controller's readings of the window."""
        return self.controller.readings(training.balance)

    def explanation(self) -> str:
        """Returns the controller's explanation."""
        return self.controller.explanation

    def state_dict(self) -> dict[str, Any]:
        """Returns the controller's state."""
        return self.controller.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Restores the controller's state."""
        self.controller.load_state_dict(state)


def _check(decision: Decision, controller: Controller, density: float) -> None:
    name = f"{type(controller).__name__}.decide()"
    if not isinstance(decision, Decision):
        raise TypeError(f"{name} returned {decision!r}; it must return a Decision.")
    change = decision.density - density
    if (decision.action == "grow" and change < 0) or (decision.action == "prune" and change > 0):
        raise ValueError(
            f"{name} returned action={decision.action!r} with density={decision.density}; the density is {density} now."
        )


def _clip(decision: Decision, network: MaskedNetwork) -> Decision:
    """Clips a decision to the densities that `layer_densities` allows."""
    density = network.reachable(decision.density)
    if decision.action in ("grow", "prune") and density == network.target:
        reason = f"{decision.reason}, but its layers' densities allow no other"
        return Decision("hold", density, reason, at_floor=decision.action == "prune")
    return replace(decision, density=density)


@dataclass(frozen=True, kw_only=True)
class ResizingMethod(SDST):
    """A method that resizes the discriminator up to a maximum.

    Args:
        discriminator_density: The discriminator's density at the start; by default the generator's, but at most
            the maximum.
        max_discriminator_density: The largest density of the discriminator, in [its density at the start, 1].

    Raises:
        ValueError: If the discriminator starts above its maximum.
    """

    max_discriminator_density: float = 1.0

    def __post_init__(self) -> None:
        """Checks the arguments."""
        super().__post_init__()
        check_density("max_discriminator_density", self.max_discriminator_density)
        start = self.initial_densities["discriminator"]
        if start > self.max_discriminator_density:
            raise ValueError(
                f"discriminator_density={start} must not be above "
                f"max_discriminator_density={self.max_discriminator_density}."
            )

    @property
    def initial_densities(self) -> dict[Role, float]:
        """The densities at which training starts."""
        start = self.discriminator_density
        if start is None:
            start = min(self.generator_density, self.max_discriminator_density)
        return {"generator": self.generator_density, "discriminator": start}


@training_method("ramp")
@dataclass(frozen=True, kw_only=True)
class Ramp(ResizingMethod):
    """The generator explores; the discriminator's density rises in a straight line over the run, without feedback."""

    needs_run_length: ClassVar[bool] = True

    @property
    def final_densities(self) -> dict[Role, float]:
        """The generator's density, and the discriminator's maximum, which it reaches at the end."""
        return {"generator": self.generator_density, "discriminator": self.max_discriminator_density}

    def mask_updates(self) -> Sequence[MaskUpdate]:
        """Returns the discriminator's growth and the generator's exploration."""
        ramp = DensityRamp(self.initial_densities["discriminator"], self.max_discriminator_density)
        return (Resize(ramp, self.drop_fraction), *super().mask_updates())
