"""Sparse training of two networks: what happens at every generator update, without Lightning and without a method."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ddst.balance import Balance, BalanceProbe, BalanceWindow, Decision
from lightning_ddst.balance.divergence import Divergence
from lightning_ddst.balance.ratio import Estimator
from lightning_ddst.methods.base import MaskUpdate, Role
from lightning_ddst.methods.plan import Plan, is_due
from lightning_ddst.sparsity import (
    MaskedNetwork,
    MaskEnforcer,
    StructuredForward,
    TrainingFlops,
    find_optimizers,
    has_updated,
)
from lightning_ddst.sparsity.channels.structured_forward import can_run_structured
from lightning_ddst.sparsity.dense_gradients import Unscaled
from lightning_ddst.sparsity.enforcement import OptimizerState
from lightning_ddst.sparsity.optimizers import get_parameters
from lightning_ddst.utils import distributed


class SparseTraining:
    """Masks two networks while they are trained, and applies what changes masks.

    It knows no method: a method is the `MaskUpdate`s that it is given. Call `before_step` and `after_step` around
    every step of the generator's optimizers, `after_batch` at the end of a training step, and `detach` at the end.
    Networks with masks of whole channels compute without the inactive ones.

    Args:
        generator: The sparse generator.
        discriminator: The sparse discriminator.
        optimizers: The optimizers of both.
        mask_updates: What changes masks, in the order in which it is applied; these become this training's.
        probe: Measures the balance ratio; None where it is not measured.
        estimator: How the balance ratio is estimated over a window.
        plan: When things happen; may be replaced by `schedule` once the run's length is known.
        unscaled: From a gradient as it arrives to a copy without the scale of the loss (fp16).
        optimizer_state: "reset" keeps the optimizer state of inactive weights at 0, "keep" leaves it.

    Attributes:
        updates: Generator updates so far.
        plan: The intervals in force.
        optimizers: The optimizers of both networks.
        window: The last measurements of the balance ratio.
        decisions: Every decision on densities with the generator update it was made at.
        rewinds: How often training went back to the initial weights.
        measurements: How often the balance ratio was measured.
        flops: Operations of training both networks.
        generator_optimizers: The optimizers whose steps are generator updates.
        divergence: Notices when training breaks down.

    Raises:
        ValueError: If a maskable weight is in none of the optimizers, or a mask update needs the balance ratio and
            nothing measures it.
    """

    def __init__(
        self,
        generator: MaskedNetwork,
        discriminator: MaskedNetwork,
        optimizers: Iterable[Optimizer],
        mask_updates: Iterable[MaskUpdate] = (),
        *,
        probe: BalanceProbe | None = None,
        estimator: Estimator = "ratio_of_means",
        plan: Plan | None = None,
        unscaled: Unscaled = torch.clone,
        optimizer_state: OptimizerState = "reset",
    ) -> None:
        self._networks: dict[Role, MaskedNetwork] = {"generator": generator, "discriminator": discriminator}
        self.mask_updates = tuple(mask_updates)
        self.updates = 0
        self.rewinds = 0
        self.decisions: list[tuple[int, Decision]] = []
        self.measurements = 0
        self.plan = plan or Plan()
        self.flops = TrainingFlops(self._networks.values())
        self.window = BalanceWindow(self.plan.window, estimator)
        self._balance: Balance | None = None
        self._probe = probe
        if probe is None and any(update.decides for update in self.mask_updates):
            raise ValueError("probe=None measures no balance ratio, which a mask update decides by.")
        self.optimizers = list(optimizers)
        self.generator_optimizers = find_optimizers(generator.parameters, self.optimizers)
        find_optimizers(discriminator.parameters, self.optimizers)
        self.divergence = Divergence({role: network.network for role, network in self._networks.items()})
        self._enforcers = {
            role: MaskEnforcer(network, self.optimizers, unscaled, optimizer_state=optimizer_state)
            for role, network in self._networks.items()
            if network.density < 1 or any(update.resizes and role in update.roles for update in self.mask_updates)
        }
        self._structured = [
            StructuredForward(network.network, network.kept)
            for role, network in self._networks.items()
            if role in self._enforcers and not network.units.dense_kernels and can_run_structured(network.network)
        ]
        for update in self.mask_updates:
            update.begin(self)
        self._expect_next()

    # ---- for mask updates --------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """The share of the run that is done, in [0, 1]; 0 where the run's length is unknown."""
        return min(self.updates / self.plan.updates, 1.0) if self.plan.updates else 0.0

    @property
    def balance(self) -> Balance:
        """The balance over the window, which is read once an update; reading waits for the device."""
        if self._balance is None:
            self._balance = self.window.read()
        return self._balance

    def network(self, role: Role) -> MaskedNetwork:
        """Returns one of the two networks."""
        return self._networks[role]

    def is_masked(self, role: Role) -> bool:
        """Returns whether a network's masks are enforced: not where it is dense and stays so."""
        return role in self._enforcers

    def dense_gradients(self, role: Role) -> dict[str, Tensor] | None:
        """Returns the gradients that the network's growth rule needs, by name of the weight.

        Gradients of a single update are given up by this call, since they are out of date after the next.

        Returns:
            Empty for rules that need none, and for a network that is dense and stays so. None where a gradient is
            missing or not finite.
        """
        return self._enforcers[role].gradients.pop() if self.is_masked(role) else {}

    # ---- around a generator update -----------------------------------------------------------------

    def schedule(self, plan: Plan) -> None:
        """Replaces the plan by one in which more is known."""
        self.plan = plan
        self.window.resize(plan.window)
        self._balance = None
        self._expect_next()

    def before_step(self, optimizer: Optimizer) -> None:
        """Keeps what a measurement will compare with; call it before a step of an optimizer of the generator's."""
        if self._probe is not None and self._probe.watching:
            self._probe.before_update(get_parameters(optimizer))

    def after_step(self, optimizer: Optimizer, batch: Any) -> bool:
        """Measures a generator update, and changes the masks that are due.

        Args:
            optimizer: One of the generator's, which made a step just now.
            batch: The training step's batch.

        Returns:
            Whether this was a generator update: an optimizer of both networks makes steps without.
        """
        if not has_updated(self.network("generator").parameters, optimizer):
            return False
        self.updates += 1
        self._balance = None
        probed = self._measure(batch)
        needed = [role in self._enforcers and self._enforcers[role].gradients.needed for role in self._networks]
        self.flops.updated(probed=probed, dense_gradients=needed)
        if self._probe is not None and is_due(self.updates, self.plan.interval):
            self.divergence.look_at(self.balance, self.updates)
        self._change_masks()
        self._expect_next()
        return True

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
        if is_due(self.updates, self.plan.probe_interval):
            self.window.add(scores)
            self.measurements += 1
        return True

    def _change_masks(self) -> None:
        for update in self.mask_updates:
            update.pending |= update.due(self.updates, self.plan)
        pending = [update for update in self.mask_updates if update.pending]
        if not pending or not self.divergence.finite(self.updates):
            return
        for update in pending:
            update.pending = not update.apply(self)
            if update.pending:
                roles = " and the ".join(update.roles)
                warnings.warn(
                    f"a change of the {roles}'s mask is postponed: at generator update {self.updates} there is no "
                    f"finite dense gradient of the {roles} to grow by.",
                    stacklevel=2,
                )
        self.check_ranks()

    def _expect_next(self) -> None:
        """Has what the next update will need recorded from now on."""
        coming = self.updates + 1
        if self._probe is not None:
            # The first update in any case, to say at once where it cannot be measured.
            self._probe.watching = not self._probe.checked or is_due(coming, self.plan.probe_interval)
        for role, enforcer in self._enforcers.items():
            enforcer.gradients.recording = any(
                update.grows and role in update.roles and (update.pending or update.due(coming, self.plan))
                for update in self.mask_updates
            )

    def check_ranks(self) -> None:
        """Compares masks and decisions over processes.

        Raises:
            RuntimeError: If they differ: each process would train another network.
        """
        if not distributed.is_distributed():
            return
        masks = tuple(network.checksum for network in self._networks.values())
        what = f"the masks and decisions at generator update {self.updates}"
        distributed.check_same(what, (masks, self.decisions[-1:]))

    def detach(self) -> None:
        """Takes every hook off the networks and optimizers."""
        self.flops.stop()
        for enforcer in self._enforcers.values():
            enforcer.remove()
        for structured in self._structured:
            structured.remove()
        if self._probe is not None:
            self._probe.remove()

    # ---- saving --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns everything but the masks, which the networks save; loads with ``weights_only=True``."""
        return {
            "updates": self.updates,
            "measurements": self.measurements,
            "checked": self._probe is not None and self._probe.checked,
            "decisions": [(update, asdict(decision)) for update, decision in self.decisions],
            "mask_updates": [{"pending": each.pending, "state": each.state_dict()} for each in self.mask_updates],
            "plan": asdict(self.plan),
            "window": self.window.state_dict(),
            "divergence": self.divergence.state_dict(),
            "flops": self.flops.state_dict(),
            "gradients": [enforcer.gradients.state_dict() for enforcer in self._enforcers.values()],
            "rewinds": self.rewinds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state returned by `state_dict`."""
        self.updates, self.measurements, self.rewinds = state["updates"], state["measurements"], state["rewinds"]
        if self._probe is not None:
            self._probe.checked = state["checked"]
        self.decisions = [(update, Decision(**decision)) for update, decision in state["decisions"]]
        for mask_update, saved in zip(self.mask_updates, state["mask_updates"], strict=True):
            mask_update.pending = saved["pending"]
            mask_update.load_state_dict(saved["state"])
        self.plan = Plan(**state["plan"])
        self.window.load_state_dict(state["window"])
        self._balance = None
        self.divergence.load_state_dict(state["divergence"])
        self.flops.load_state_dict(state["flops"])
        for enforcer, saved in zip(self._enforcers.values(), state["gradients"], strict=True):
            enforcer.gradients.load_state_dict(saved)
        self._expect_next()
