"""Single dynamic sparse training (SDST): the generator explores."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from lightning_ddst.methods.base import MaskUpdate, Method, Role, training_method
from lightning_ddst.methods.intervals import Plan, is_due
from lightning_ddst.methods.training import SparseTraining
from lightning_ddst.sparsity import SCHEDULES, MaskedNetwork, exploration_rate
from lightning_ddst.utils.validation import check_rate


@dataclass(frozen=True)
class DropFractionSchedule:
    """The drop fraction: the share of active weights that an exploration (prune and regrow) replaces.

    Attributes:
        rate: Drop fraction at the start, in [0, 1]; None means the default of the masks' units (0.5 for weights).
        schedule: Decay of the drop fraction over the run, a key of `lightning_ddst.sparsity.SCHEDULES`.
    """

    rate: float | None = None
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if self.rate is not None:
            check_rate("exploration_rate", self.rate)
        SCHEDULES.find("schedule", self.schedule)

    def for_network(self, network: MaskedNetwork) -> "DropFractionSchedule":
        """Returns the schedule with its rate, or else the default rate of the network's units."""
        return self if self.rate is not None else replace(self, rate=network.units.drop_fraction)

    def at(self, progress: float) -> float:
        """Returns the drop fraction at a share of the run that is done, in [0, 1]."""
        assert self.rate is not None
        return exploration_rate(self.rate, self.schedule, progress)


class Explore(MaskUpdate):
    """A mask update that explores a network: it prunes a share of the active weights and grows as many.

    The network's growth rule decides which weights grow: at random in SET, by the dense gradient in RigL.

    Args:
        role: The network.
        drop_fraction: The share of active weights to replace, over the run.
    """

    resizes: ClassVar[bool] = False

    def __init__(self, role: Role, drop_fraction: DropFractionSchedule) -> None:
        self.roles = (role,)
        self._role: Role = role
        self._drop_fraction = drop_fraction
        self._has_inactive = True

    def begin(self, training: SparseTraining) -> None:
        """Checks whether the network is masked: a network that stays dense has nothing to explore."""
        self._has_inactive = training.is_masked(self._role)
        self._drop_fraction = self._drop_fraction.for_network(training.network(self._role))

    def due(self, update: int, plan: Plan) -> bool:
        """Returns whether an exploration is due: every ``plan.explore_interval`` updates."""
        return self._has_inactive and is_due(update, plan.explore_interval)

    def describe_plan(self, plan: Plan) -> str:
        """Returns how often the network explores."""
        if not self._has_inactive or plan.explore_interval is None:
            return ""
        return f"exploration of the {self._role} {plan.times(plan.explore_interval)}"

    def apply(self, training: SparseTraining) -> bool:
        """Explores if the dense gradients are available."""
        gradients = training.dense_gradients(self._role)
        if gradients is None:
            return False
        training.network(self._role).explore(self._drop_fraction.at(training.progress), gradients)
        return True


@training_method("sdst")
@dataclass(frozen=True, kw_only=True)
class SDST(Method):
    """Single dynamic sparse training: the generator explores, the discriminator's mask is static.

    With ``growth="random"`` it is SET (Mocanu et al. 2018), with "gradient" RigL (Evci et al. 2020), each with a
    balanced discriminator (the generator's density) or a strong one (``discriminator_density=1``).

    Args:
        exploration_rate: Drop fraction at the start: the share of active weights, or channels, that an exploration
            replaces, in [0, 1]; by default 0.5, the paper's, and 0.1 for channels.
        schedule: Decay of the drop fraction over the run, a key of `lightning_ddst.sparsity.SCHEDULES`.
    """

    exploration_rate: float | None = None
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        """Checks the arguments."""
        super().__post_init__()
        DropFractionSchedule(self.exploration_rate, self.schedule)

    @property
    def drop_fraction(self) -> DropFractionSchedule:
        """The schedule of the drop fraction."""
        return DropFractionSchedule(self.exploration_rate, self.schedule)

    def mask_updates(self) -> Sequence[MaskUpdate]:
        """Returns the generator's exploration."""
        return (Explore("generator", self.drop_fraction),)
