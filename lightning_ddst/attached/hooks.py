"""Hooks that connect sparse training with the optimizers of a GAN, whichever loop steps them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ddst.attached.checks import check_finite_weights, warn_of_large_steps, warn_of_unmasked
from lightning_ddst.attached.options import RunOptions
from lightning_ddst.attached.pending_gradients import PendingGradients
from lightning_ddst.methods import Plan, SparseTraining
from lightning_ddst.methods.masked_pair import MaskedPair
from lightning_ddst.sparsity import find_optimizers
from lightning_ddst.sparsity.dense_gradients import Unscaled
from lightning_ddst.sparsity.optimizers import register_step_post_hook
from lightning_ddst.utils import distributed
from lightning_ddst.utils.compilation import uncompiled
from lightning_ddst.utils.states import ANYTHING, PLAIN, TEXT, Form, check_state, named, restoring


class AttachedTraining:
    """Sparse training whose hooks see every step of the generator's optimizers.

    A training loop calls `begin_batch` before every training step and `end_batch` after it. In between, the steps of
    the generator's optimizers are generator updates.

    Args:
        pair: The two masked networks.
        options: The options of the run.
        optimizers: The optimizers of both networks, always in the same order.
        name: Name of what the state belongs to, for errors.
        plan: The intervals.
        unscaled: Function that copies a gradient and removes the loss scale (fp16).
        after_update: Called after every generator update, with whether it restored the initial weights.
        state: The state returned by `state_dict`, to resume from.

    Attributes:
        pair: The two masked networks.
        training: The training.
        pending: The gradients that wait for a step.

    Raises:
        ValueError: If a maskable weight is in none of the optimizers, or a new run starts from a weight that is not
            finite.
    """

    state_form: ClassVar[Form] = {
        "method": TEXT,
        "settings": named(PLAIN),
        "networks": named(ANYTHING),  # depends on the granularity
        "training": SparseTraining.state_form,
        "pending_gradients": PendingGradients.state_form,
    }
    """The form of `state_dict`."""

    def __init__(
        self,
        pair: MaskedPair,
        options: RunOptions,
        optimizers: Sequence[Optimizer],
        *,
        name: str,
        plan: Plan,
        unscaled: Unscaled = torch.clone,
        after_update: Callable[[bool], None],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.pair = pair
        self._options = options
        self._after_update: Callable[[bool], None] | None = after_update
        self._batch: Any = None
        self._in_batch = False
        for network in pair.networks.values():
            if distributed.is_distributed():  # each process may have drawn other masks
                network.load_state_dict(distributed.broadcast(network.state_dict()))
            network.to_weights()
        for network in pair.networks.values():
            find_optimizers(network.parameters, optimizers)  # raises before hooks are registered
        if state is None:
            check_finite_weights(pair)
        self.training = SparseTraining(
            pair.networks["generator"],
            pair.networks["discriminator"],
            optimizers,
            options.method.mask_updates(),
            probe=options.measuring.probe(pair) if options.measured else None,
            estimator=options.measuring.estimator,
            plan=plan,
            unscaled=unscaled,
            optimizer_state=options.masking.optimizer_state,
        )
        self.pending = PendingGradients(optimizers)
        self._handles: list[RemovableHandle] = []
        try:
            if state is not None:
                with restoring(name):
                    self.training.load_state_dict(state["training"])
                self.training.schedule(plan)
            self.training.check_ranks()
            warn_of_unmasked(pair, self.training)
            if options.masking.optimizer_state == "reset":
                warn_of_large_steps(pair, self.training)
        except BaseException:
            self.detach()
            raise
        for optimizer in self.training.generator_optimizers:
            self._handles += [
                optimizer.register_step_pre_hook(lambda *_, own=optimizer: self._before_step(own)),
                register_step_post_hook(optimizer, self._after_step),
            ]

    def begin_batch(self, batch: Any) -> None:
        """Starts a training step; the batch holds the real images."""
        self._batch, self._in_batch = batch, True

    def end_batch(self, batch: Any) -> None:
        """Ends a training step."""
        self.abandon_batch()
        rewinds = self.training.rewinds
        if self.training.after_batch(batch):
            self._report_update(rewinds)

    def abandon_batch(self) -> None:
        """Ends a training step that raised an error."""
        self._batch, self._in_batch = None, False

    @uncompiled
    def _before_step(self, optimizer: Optimizer) -> None:
        if self._in_batch:
            self.training.before_step(optimizer)

    @uncompiled
    def _after_step(self, optimizer: Optimizer) -> None:
        if not self._in_batch:
            return  # loading an FSDP2 checkpoint also steps the optimizers
        rewinds = self.training.rewinds
        if self.training.after_step(optimizer, self._batch):
            self._report_update(rewinds)

    def _report_update(self, rewinds: int) -> None:
        if self._after_update is not None:
            self._after_update(self.training.rewinds > rewinds)

    def detach(self) -> None:
        """Removes every hook from the networks and optimizers."""
        self.abandon_batch()
        self.training.detach()
        self.pending.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._after_update = None  # it may hold what cannot be pickled

    def state_dict(self) -> dict[str, Any]:
        """Returns masks, counters, the balance window and pending gradients; loads with ``weights_only=True``."""
        return {
            "method": self._options.method.name,
            "settings": self._options.arguments(),
            "networks": self.pair.state_dict(),
            "training": self.training.state_dict(),
            "pending_gradients": self.pending.state_dict(),
        }


def check_attached(owner: str, state: Any, others: Form) -> None:
    """Checks the form of a saved state of sparse training, which may be of another method and granularity.

    Args:
        owner: The name of what restores the state, for the error.
        state: The state returned by `AttachedTraining.state_dict`, with other entries.
        others: The forms of the other entries.

    Raises:
        StateError: For a state of another form.
    """
    check_state(owner, state, AttachedTraining.state_form | others)
    with restoring(owner):
        form = MaskedPair.state_form(state["settings"].get("granularity"))
    check_state(owner, {"networks": state["networks"]}, {"networks": form})
