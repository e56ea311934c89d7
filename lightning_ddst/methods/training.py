"""Double dynamic sparse training: what happens at every generator update, without Lightning."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_ddst.balance.controller import Controller, Decision
from lightning_ddst.balance.divergence import Divergence
from lightning_ddst.balance.probe import BalanceProbe
from lightning_ddst.balance.ratio import BalanceWindow, Estimator
from lightning_ddst.methods.pruning import InitialWeights, MagnitudePruning
from lightning_ddst.sparsity import (
    MaskedNetwork,
    MaskEnforcer,
    StructuredForward,
    TrainingFlops,
    exploration_rate,
    find_optimizers,
    has_updated,
)
from lightning_ddst.sparsity.channels.structured_forward import can_run_structured
from lightning_ddst.sparsity.enforcement import Unscaled, get_parameters
from lightning_ddst.utils import distributed


@dataclass(frozen=True)
class Plan:
    """When things happen, in generator updates; None is never, or not known yet.

    Attributes:
        interval: Between decisions on the discriminator's density.
        explore_interval: Between explorations of the generator.
        probe_interval: Between measurements of the balance ratio.
        updates: The run's length, over which exploration is annealed.
    """

    interval: int | None = None
    explore_interval: int | None = None
    probe_interval: int | None = None
    updates: int | None = None

    @property
    def window(self) -> int:
        """Measurements between two decisions; a few while that is not known."""
        return max(1, (self.interval or 10) // (self.probe_interval or 1))


@dataclass(frozen=True)
class DropFractionSchedule:
    """The share of active weights that an exploration replaces.

    Attributes:
        rate: At the start, in [0, 1].
        schedule: How it falls, a key of `lightning_ddst.sparsity.SCHEDULES`.
    """

    rate: float = 0.5
    schedule: str = "cosine"

    def at(self, update: int, length: int | None) -> float:
        """The share at a generator update of a run of that length; constant where it is unknown."""
        return exploration_rate(self.rate, self.schedule, update / length if length else 0.0)


class SparseTraining:
    """Masks two networks while they are trained, and changes the masks as the method says.

    Networks with masks of whole channels compute without the inactive ones.

    In the paper's words: the generator explores (SDST), and the discriminator's density follows
    the balance ratio (DDA); DDST is both. Call `before_step` and `after_step` around every step of
    the generator's optimizers, `after_batch` at the end of a training step, and `detach` at the end.

    Args:
        generator: The sparse generator.
        discriminator: The sparse discriminator.
        optimizers: The optimizers of both.
        explores: Whether the generator explores.
        controller: Decides on the discriminator's density; None leaves it.
        pruning: Prunes networks that are dense at first; None does not.
        pruned_to: The densities that it prunes the generator and the discriminator to.
        probe: Measures the balance ratio; None where it is not measured.
        exploration: How much is explored.
        estimator: Of the balance ratio over a window.
        plan: When things happen; may be replaced by `schedule` once the run's length is known.
        unscaled: From a gradient as it arrives to a copy without the scale of the loss (fp16).

    Attributes:
        updates: Generator updates so far.
        rewinds: How often training went back to the initial weights.
        decisions: Every decision with the generator update it was made at.
        measurements: How often the balance ratio was measured.
        flops: Operations of training both networks.
        generator_optimizers: The optimizers whose steps are generator updates.
        divergence: Notices when training breaks down.

    Raises:
        ValueError: If a maskable weight is in none of the optimizers.
    """

    def __init__(
        self,
        generator: MaskedNetwork,
        discriminator: MaskedNetwork,
        optimizers: Iterable[Optimizer],
        *,
        explores: bool,
        controller: Controller | None,
        probe: BalanceProbe | None,
        exploration: DropFractionSchedule,
        estimator: Estimator,
        plan: Plan,
        pruning: MagnitudePruning | None = None,
        pruned_to: tuple[float, float] = (1.0, 1.0),
        unscaled: Unscaled = torch.clone,
    ) -> None:
        self.generator = generator
        self.discriminator = discriminator
        self.updates = 0
        self.rewinds = 0
        self.decisions: list[tuple[int, Decision]] = []
        self.measurements = 0
        self.flops = TrainingFlops([generator, discriminator])
        self.window = BalanceWindow(plan.window, estimator)
        self.plan = plan
        self._explores = explores and generator.density < 1
        self._controller = controller
        self._exploration = exploration
        self._probe = probe
        self._explore_due = self._decision_due = False
        self._pruning = pruning
        self._pruned_to = dict(zip((generator, discriminator), pruned_to, strict=True))
        self._optimizers = optimizers = list(optimizers)
        self.generator_optimizers = find_optimizers(generator.parameters, optimizers)
        find_optimizers(discriminator.parameters, optimizers)
        self.divergence = Divergence({"generator": generator.network, "discriminator": discriminator.network})
        self._holds = {
            network: MaskEnforcer(network, optimizers, unscaled)
            for network in (generator, discriminator)
            if network.density < 1 or (network is discriminator and controller is not None) or pruning is not None
        }
        self._narrow = [
            StructuredForward(network.network, network.kept)
            for network in self._holds
            if not network.units.dense_kernels and can_run_structured(network.network)
        ]
        self._initial: InitialWeights | None = None
        if pruning is not None and pruning.rewinds:
            self._initial = InitialWeights([generator.network, discriminator.network])
        self._expect_next()

    def schedule(self, plan: Plan) -> None:
        """Takes over a plan in which more is known."""
        self.plan = plan
        self.window.resize(plan.window)
        self._expect_next()

    def detach(self) -> None:
        """Takes every hook off the networks and optimizers."""
        self.flops.stop()
        for hold in self._holds.values():
            hold.remove()
        for narrow in self._narrow:
            narrow.remove()
        if self._probe is not None:
            self._probe.remove()

    # ---- around a generator update -----------------------------------------------------------------

    def before_step(self, optimizer: Optimizer) -> None:
        """Keeps what a measurement will compare with; call it before a step of an optimizer of the generator's."""
        if self._probe is not None and self._probe.watching:
            self._probe.before_update(get_parameters(optimizer))

    def after_step(self, optimizer: Optimizer, batch: Any) -> bool:
        """Goes on from a generator update: measures, decides, changes masks.

        Args:
            optimizer: One of the generator's, which made a step just now.
            batch: The training step's batch.

        Returns:
            Whether this was a generator update: an optimizer of both networks makes steps without.
        """
        if not has_updated(self.generator.parameters, optimizer):
            return False
        self.updates += 1
        probed = self._measure(batch)
        needed = [self._needs_gradients(network) for network in (self.generator, self.discriminator)]
        self.flops.updated(probed=probed, dense_gradients=needed)
        self._decision_due |= self._controller is not None and self._is_due(self.plan.interval)
        self._explore_due |= self._explores and self._is_due(self.plan.explore_interval)
        if self._probe is not None and self._controller is None and self._is_due(self.plan.interval):
            self.divergence.look_at(self.window.read(), self.updates)
        if self._decision_due or self._explore_due:
            self._change_masks()
        self._prune()
        self._expect_next()
        return True

    def _change_masks(self) -> None:
        if not self.divergence.finite(self.updates):
            return
        if self._decision_due:
            self._decide()
        if self._explore_due:
            self._explore_generator()
        self.check_ranks()

    def _prune(self) -> None:
        if self._pruning is None or self.plan.updates is None:
            return
        number = self._pruning.round_at(self.updates, self.plan.updates)
        if number is None or not self.divergence.finite(self.updates):
            return
        for network, target in self._pruned_to.items():
            network.resize(self._pruning.density(number, target))
        reason = f"round {number} of {self._pruning.rounds}: pruned by magnitude, the generator to "
        reason += f"{self.generator.density:.4g}, the discriminator to {self.discriminator.density:.4g}"
        if self._initial is not None:
            self._initial.restore(self._optimizers)
            for network in self._pruned_to:
                network.apply_masks()
            self.rewinds += 1
            reason += ", and back to the initial weights"
        self.decisions.append((self.updates, Decision("prune", self.discriminator.target, reason)))
        self.check_ranks()

    def check_ranks(self) -> None:
        """Compares masks and decisions over processes.

        Raises:
            RuntimeError: If they differ: each process would train another network.
        """
        if not distributed.is_distributed():
            return
        masks = (self.generator.checksum, self.discriminator.checksum)
        distributed.check_same(
            f"the masks and decisions at generator update {self.updates}", (masks, self.decisions[-1:])
        )

    def after_batch(self, batch: Any) -> None:
        """Has the first measured training step looked at as a whole."""
        if self._probe is not None and not self._probe.checked:
            self._probe.check(batch)
            self._expect_next()

    def _measure(self, batch: Any) -> bool:
        if self._probe is None or not self._probe.watching:
            return False
        with self.flops.probing():
            scores = distributed.all_reduce_mean(self._probe.after_update(batch))
        if self._is_due(self.plan.probe_interval):
            self.window.add(scores)
            self.measurements += 1
        return True

    def _decide(self) -> None:
        assert self._controller is not None
        balance = self.window.read()
        if self._is_due(self.plan.interval):  # not again for a decision that was put off
            self.divergence.look_at(balance, self.updates)
            self._controller.observe(balance)
        shares = (0.0, 0.0)
        if self.plan.updates and self.plan.interval:
            shares = (self.updates / self.plan.updates, self.plan.interval / self.plan.updates)
        decision = self._allowed(self._controller.decide(balance, self.discriminator.target, *shares))
        gradients = self._holds[self.discriminator].gradients.take()
        if decision.action in ("grow", "explore") and gradients is None:
            self._postponed("discriminator")
            return
        if decision.action == "explore":
            self.discriminator.explore(self._exploration.at(self.updates, self.plan.updates), gradients)
        elif decision.action in ("grow", "prune"):
            self.discriminator.resize(decision.density, gradients)
        self.decisions.append((self.updates, decision))
        self._decision_due = False

    def _allowed(self, decision: Decision) -> Decision:
        """What layers of given densities let of a decision."""
        density = self.discriminator.reachable(decision.density)
        if decision.action in ("grow", "prune") and density == self.discriminator.target:
            reason = f"{decision.reason}, but its layers' densities allow no other"
            return Decision("hold", density, reason, at_floor=decision.action == "prune")
        return replace(decision, density=density)

    def _explore_generator(self) -> None:
        gradients = self._holds[self.generator].gradients.take()
        if gradients is None:
            self._postponed("generator")
            return
        self.generator.explore(self._exploration.at(self.updates, self.plan.updates), gradients)
        self._explore_due = False

    def _postponed(self, role: str) -> None:
        warnings.warn(
            f"a change of the {role}'s mask is put off: at generator update {self.updates} there is no finite dense "
            f"gradient of the {role} to grow by.",
            stacklevel=2,
        )

    def _is_due(self, interval: int | None, ahead: int = 0) -> bool:
        return interval is not None and (self.updates + ahead) % interval == 0

    def _expect_next(self) -> None:
        """Has what the next update will need observed from now on."""
        if self._probe is not None:
            # The first update in any case, to say at once where it cannot be measured.
            self._probe.watching = not self._probe.checked or self._is_due(self.plan.probe_interval, ahead=1)
        if self._explores:
            self._holds[self.generator].gradients.armed = self._explore_due or self._is_due(
                self.plan.explore_interval, ahead=1
            )
        if self._controller is not None:
            self._holds[self.discriminator].gradients.armed = self._decision_due or self._is_due(
                self.plan.interval, ahead=1
            )

    def _needs_gradients(self, network: MaskedNetwork) -> bool:
        return network in self._holds and self._holds[network].gradients.wanted

    # ---- saving --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but the masks, which the networks save; loads with ``weights_only=True``."""
        return {
            "updates": self.updates,
            "measurements": self.measurements,
            "checked": self._probe is not None and self._probe.checked,
            "decisions": [(update, asdict(decision)) for update, decision in self.decisions],
            "due": [self._explore_due, self._decision_due],
            "plan": asdict(self.plan),
            "window": self.window.state_dict(),
            "divergence": self.divergence.state_dict(),
            "flops": self.flops.state_dict(),
            "gradients": [hold.gradients.state_dict() for hold in self._holds.values()],
            "controller": {} if self._controller is None else self._controller.state_dict(),
            "rewinds": self.rewinds,
            "initial": None if self._initial is None else self._initial.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.updates, self.measurements = state["updates"], state["measurements"]
        if self._probe is not None:
            self._probe.checked = state["checked"]
        self.decisions = [(update, Decision(**decision)) for update, decision in state["decisions"]]
        self._explore_due, self._decision_due = state["due"]
        self.plan = Plan(**state["plan"])
        self.window.load_state_dict(state["window"])
        self.divergence.load_state_dict(state["divergence"])
        self.flops.load_state_dict(state["flops"])
        for hold, saved in zip(self._holds.values(), state["gradients"], strict=True):
            hold.gradients.load_state_dict(saved)
        if self._controller is not None:
            self._controller.load_state_dict(state["controller"])
        self.rewinds = state["rewinds"]
        if self._initial is not None:
            self._initial.load_state_dict(state["initial"])
        self._expect_next()
