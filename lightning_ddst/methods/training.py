"""Sparse training of two networks, independent of Lightning and of the method."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ddst.balance import Balance, BalanceProbe, BalanceWindow, Decision
from lightning_ddst.balance.divergence import Divergence
from lightning_ddst.balance.ratio import Estimator
from lightning_ddst.methods.base import MaskUpdate, Role
from lightning_ddst.methods.intervals import Plan, is_due
from lightning_ddst.sparsity import (
    MaskedNetwork,
    MaskEnforcer,
    StructuredForward,
    TrainingFlops,
    find_optimizers,
)
from lightning_ddst.sparsity.channels.structured_forward import can_run_structured
from lightning_ddst.sparsity.dense_gradients import DenseGradients, Unscaled
from lightning_ddst.sparsity.enforcement import OptimizerState
from lightning_ddst.sparsity.optimizers import UpdateSteps, get_parameters
from lightning_ddst.utils import distributed
from lightning_ddst.utils.states import ANYTHING, COUNT, FLAG, Form, each, make_loadable, maybe, named


class SparseTraining:
    """Sparse training of two networks: enforces their masks and applies mask updates.

    It does not depend on the method; a method is a sequence of `MaskUpdate` objects. Call `before_step` and
    `after_step` around every step of the generator's optimizers, `after_batch` at the end of a training step, and
    `detach` at the end. Networks with masks of whole channels compute without the inactive channels.

    Args:
        generator: The sparse generator.
        discriminator: The sparse discriminator.
        optimizers: The optimizers of both.
        mask_updates: Rules that change masks, in the order of their application. Do not share them between trainings.
        probe: Probe of the balance ratio; None if it is not measured.
        estimator: Estimator of the balance ratio over a window.
        plan: The intervals; `schedule` may replace them once the run's length is known.
        unscaled: Function that copies a gradient and removes the loss scale (fp16).
        optimizer_state: "reset" keeps the optimizer state of inactive weights at 0, "keep" leaves it.

    Attributes:
        updates: Generator updates so far.
        plan: The current intervals.
        optimizers: The optimizers of both networks.
        window: The last measurements of the balance ratio.
        decisions: All decisions on densities, each with its generator update.
        rewinds: Number of times the initial weights were restored.
        measurements: Number of measurements of the balance ratio.
        flops: Operations of training both networks.
        generator_optimizers: The optimizers whose steps are generator updates.
        divergence: Detector of training that has broken down.

    Raises:
        ValueError: If a maskable weight is in none of the optimizers, or a mask update needs the balance ratio and
            there is no probe.
    """

    state_form: ClassVar[Form] = {
        "updates": COUNT,
        "measurements": COUNT,
        "probe": maybe(BalanceProbe.state_form),
        "decisions": each((COUNT, Decision.state_form)),
        "mask_updates": each({"pending": FLAG, "state": named(ANYTHING)}),
        "plan": Plan.state_form,
        "window": BalanceWindow.state_form,
        "divergence": Divergence.state_form,
        "flops": TrainingFlops.state_form,
        "gradients": each(DenseGradients.state_form),
        "rewinds": COUNT,
    }
    """The form of `state_dict`; mask updates check their own states."""

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
        for update in self.mask_updates:
            if isinstance(update.roles, str) or not set(update.roles) <= set(self._networks):
                allowed = "a tuple of generator, discriminator"
                raise ValueError(f"{type(update).__name__}.roles={update.roles!r} must be {allowed}.")
        self.updates = 0
        self.rewinds = 0
        self.decisions: list[tuple[int, Decision]] = []
        self.measurements = 0
        self.plan = plan or Plan()
        self.window = BalanceWindow(self.plan.window, estimator)
        self._balance: Balance | None = None
        self._probe = probe
        if probe is None and any(update.decides for update in self.mask_updates):
            raise ValueError("probe=None measures no balance ratio, but a mask update needs it.")
        self.optimizers = list(optimizers)
        self.flops = TrainingFlops(self._networks.values(), self.optimizers)
        self._warned_of_uncounted = False
        self._looked_at: tuple[bool, int, int] | None = None
        self._postponed: set[int] = set()  # ids of the mask updates that were warned of
        self._told_frozen: dict[Role, set[str]] = {role: set() for role in self._networks}
        self.generator_optimizers = find_optimizers(generator.parameters, self.optimizers)
        self._steps = UpdateSteps(generator.parameters, self.generator_optimizers)
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
        try:
            for update in self.mask_updates:
                update.begin(self)
                _saved(update)  # an error of saving comes now
            self._expect_next()
        except BaseException:
            self.detach()
            raise

    # ---- for mask updates --------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """The share of the run that is done, in [0, 1]; 0 where the run's length is unknown."""
        return min(self.updates / self.plan.updates, 1.0) if self.plan.updates else 0.0

    @property
    def discriminator_used(self) -> bool:
        """Whether the discriminator was called or trained so far, as far as the balance ratio depends on it."""
        return self._probe is None or self._probe.used

    @property
    def balance(self) -> Balance:
        """The balance over the window, which is computed once per update; this waits for the device."""
        if self._balance is None:
            self._balance = self.window.read()
        return self._balance

    def network(self, role: Role) -> MaskedNetwork:
        """Returns one of the two networks."""
        return self._networks[role]

    def is_masked(self, role: Role) -> bool:
        """Returns whether a network's masks are enforced: not if it stays dense."""
        return role in self._enforcers

    def dense_gradients(self, role: Role) -> dict[str, Tensor] | None:
        """Returns the gradients that the network's growth rule needs, by name of the weight.

        This call removes gradients of a single update, since they are out of date after the next update.

        Returns:
            Empty for rules that need none, and for a network that is dense and stays so. None where a gradient is
            missing or not finite.
        """
        return self._enforcers[role].gradients.pop() if self.is_masked(role) else {}

    # ---- around a generator update -----------------------------------------------------------------

    def schedule(self, plan: Plan) -> None:
        """Replaces the plan, after the run's length is known."""
        self.plan = plan
        self.window.resize(plan.window)
        self._balance = None
        self._expect_next()

    def before_step(self, optimizer: Optimizer) -> None:
        """Keeps the weights for a measurement; call it before each step of the generator's optimizers."""
        if self._probe is not None and self._probe.watching and not self._steps.begun:
            updated = [optimizer, *(each for each in self.generator_optimizers if each is not optimizer)]
            self._probe.before_update(parameter for each in updated for parameter in get_parameters(each))

    def after_step(self, optimizer: Optimizer, batch: Any) -> bool:
        """Measures a generator update, and changes the masks that are due.

        Args:
            optimizer: One of the generator's optimizers, which has just made a step.
            batch: The training step's batch.

        Returns:
            Whether this completed a generator update: an optimizer of both networks may step without the generator, and
            the steps of several optimizers of the generator are one update.
        """
        return self._steps.add(optimizer) and self._complete_update(batch)

    def _complete_update(self, batch: Any) -> bool:
        self.updates += 1
        self._balance = None
        probed = self._measure(batch)
        needed = [role in self._enforcers and self._enforcers[role].gradients.needed for role in self._networks]
        self.flops.updated(probed=probed, dense_gradients=needed)
        self._warn_of_uncounted()
        if self._probe is not None and is_due(self.updates, self.plan.interval) and self.balance.samples:
            self.divergence.look_at(self.balance, self.updates)
        self._change_masks()
        self._expect_next()
        return True

    def _warn_of_uncounted(self) -> None:
        if self._warned_of_uncounted or self.flops.stage == self._looked_at:
            return  # nothing was measured since the last look
        self._looked_at = self.flops.stage
        found = dict(zip(self._networks, self.flops.find_uncounted(), strict=True))
        if named := [f"the {role}'s {', '.join(map(repr, names))}" for role, names in found.items() if names]:
            self._warned_of_uncounted = True
            warnings.warn(
                f"training operations of {' and '.join(named)} are not counted: no matrix product or convolution with "
                "these masked weights was seen.",
                stacklevel=2,
            )

    def after_batch(self, batch: Any) -> bool:
        """Ends a training step: steps of some of the generator's optimizers, without the others, are an update, too.

        Args:
            batch: The training step's batch.

        Returns:
            Whether that completed a generator update.
        """
        completed = self._steps.end_batch() and self._complete_update(batch)
        if self._probe is not None and not self._probe.checked:
            self._probe.check(batch)
            self._expect_next()
        return completed

    def _measure(self, batch: Any) -> bool:
        if self._probe is None or not self._probe.watching:
            return False
        with self.flops.probing() as counted:
            scores = self._probe.after_update(batch, counted=counted)
        due = is_due(self.updates, self.plan.probe_interval)
        if scores is None:
            if due:
                self.window.add_missing()
            return False
        scores = distributed.all_reduce_mean(scores)
        if due:
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
            self._tell_frozen(update.roles)
            applied = update.apply(self)
            if not isinstance(applied, bool):  # None, without a return statement, would mean to try again
                raise TypeError(f"{type(update).__name__}.apply() returned {applied!r}; it must return True or False.")
            update.pending = not applied
            if update.pending and id(update) not in self._postponed:
                self._postponed.add(id(update))
                self._warn_of_postponed(update)
        self.check_ranks()

    def _tell_frozen(self, roles: Iterable[Role]) -> None:
        for role in roles:
            network = self.network(role)
            if names := network.frozen - self._told_frozen[role]:
                distributed.warn(
                    f"weights of the {role} were frozen since they were masked, "
                    f"{', '.join(map(repr, sorted(names)))}: their masks stay as they are until these weights "
                    "are trained again."
                )
            self._told_frozen[role] = set(network.frozen)

    def _warn_of_postponed(self, update: MaskUpdate) -> None:
        roles = " and the ".join(update.roles)
        names = [
            self._networks[role].full_name(name)
            for role in update.roles
            if self.is_masked(role)
            for name in self._enforcers[role].gradients.unusable
        ]
        shown = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        if not update.grows or not (names or distributed.is_distributed()):
            distributed.warn(
                f"{type(update).__name__}.apply() returned False at generator update {self.updates}: it is called "
                "again at every update until it returns True."
            )
            return
        warnings.warn(
            f"a change of the {roles}'s mask is postponed: at generator update {self.updates} there is no finite dense "
            f"gradient to grow by of {shown or 'a weight in another process'}. It is tried again at every update. Name "
            "layers that training does not use in dense_layers, and compute gradients by backward(): those that are "
            "assigned to .grad are not seen.",
            stacklevel=2,
        )

    def _expect_next(self) -> None:
        """Starts or stops recording, depending on the needs of the next update."""
        coming = self.updates + 1
        if self._probe is not None:
            # Always records the first update with the discriminator, so that errors of measuring appear at once.
            unknown = not (self._probe.checked and self._probe.used)
            self._probe.watching = unknown or is_due(coming, self.plan.probe_interval)
        for role, enforcer in self._enforcers.items():
            enforcer.gradients.recording = any(
                update.grows and role in update.roles and (update.pending or update.due(coming, self.plan))
                for update in self.mask_updates
            )

    def check_ranks(self) -> None:
        """Checks that masks and decisions are the same in all processes.

        Raises:
            RuntimeError: If they differ, so that each process would train another network.
        """
        if not distributed.is_distributed():
            return
        masks = tuple(network.checksum for network in self._networks.values())
        what = f"the masks and decisions at generator update {self.updates}"
        distributed.check_same(what, (masks, self.decisions[-1:]))

    def detach(self) -> None:
        """Removes every hook from the networks and optimizers."""
        self.flops.stop()
        for enforcer in self._enforcers.values():
            enforcer.remove()
        for structured in self._structured:
            structured.remove()
        if self._probe is not None:
            self._probe.remove()

    # ---- saving --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns the state without the masks, which the networks save; loads with ``weights_only=True``."""
        return {
            "updates": self.updates,
            "measurements": self.measurements,
            "probe": None if self._probe is None else self._probe.state_dict(),
            "decisions": [
                (update, asdict(decision) | {"density": float(decision.density)}) for update, decision in self.decisions
            ],
            "mask_updates": [{"pending": each.pending, "state": _saved(each)} for each in self.mask_updates],
            "plan": asdict(self.plan),
            "window": self.window.state_dict(),
            "divergence": self.divergence.state_dict(),
            "flops": self.flops.state_dict(),
            "gradients": [enforcer.gradients.state_dict() for enforcer in self._enforcers.values()],
            "rewinds": self.rewinds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state returned by `state_dict`.

        Raises:
            ValueError: For a state of other networks or of another method.
        """
        for key, own in (("mask_updates", self.mask_updates), ("gradients", self._enforcers)):
            if len(state[key]) != len(own):
                raise ValueError(f"{key} must have {len(own)} entries, and has {len(state[key])}.")
        self.updates, self.measurements, self.rewinds = state["updates"], state["measurements"], state["rewinds"]
        if self._probe is not None and state.get("probe") is not None:
            self._probe.load_state_dict(state["probe"])
        self.decisions = restore_decisions(state["decisions"])
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


def _saved(update: MaskUpdate) -> dict[str, Any]:
    name = type(update).__name__
    state = update.state_dict()
    if not isinstance(state, dict):
        raise TypeError(f"{name}.state_dict() returned {state!r}; it must return a dict.")
    loadable: dict[str, Any] = make_loadable(name, state)
    return loadable


def restore_decisions(saved: Iterable[tuple[int, Mapping[str, Any]]]) -> list[tuple[int, Decision]]:
    """Returns the decisions in a state returned by `SparseTraining.state_dict`."""
    return [(update, Decision(**decision)) for update, decision in saved]
