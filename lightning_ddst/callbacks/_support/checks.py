"""What a run must not have, or should be warned of: each check is one function."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn

from lightning_ddst.balance import ScoresItself
from lightning_ddst.methods import Method, SparseTraining
from lightning_ddst.methods.pair import MaskedPair


def check_separate(pair: MaskedPair, others: Iterable[MaskedPair], module: LightningModule) -> None:
    """Checks that several pairs of one module share no weight and are measured one by one.

    Raises:
        ValueError: If a weight is in two pairs, or the module gives the scores of one pair only.
    """
    others = list(others)
    if others and isinstance(module, ScoresItself):
        raise ValueError(
            f"{type(module).__name__}.balance_scores gives the scores of one pair, and there are "
            f"{len(others) + 1} DynamicSparsityCallbacks."
        )
    own = {id(parameter) for network in pair.networks.values() for parameter in network.parameters.values()}
    for other in others:
        for role, network in other.networks.items():
            if any(id(parameter) in own for parameter in network.parameters.values()):
                raise ValueError(f"two DynamicSparsityCallbacks mask the same {role}; each weight has one mask.")


def check_checkpoint(saved: Mapping[str, Any], key: str, method: Method, *, needs_masks: bool) -> None:
    """Checks that a checkpoint can be resumed from.

    Args:
        saved: The states of callbacks in it, by their keys.
        key: The key of the callback that resumes.
        method: The method of the callback that resumes.
        needs_masks: Whether the checkpoint must hold masks.

    Raises:
        ValueError: If it is of another method's run, or holds no masks.
    """
    before = saved.get(key, {}).get("method", method.name)
    if before != method.name:
        raise ValueError(
            f'the checkpoint is of a run with method="{before}", and this one has method="{method.name}". To '
            "begin another run from its weights, load them into the module and fit without ckpt_path."
        )
    if saved.get(key) or not needs_masks:
        return
    others = [other for other in saved if other.startswith(key.partition("{")[0])]
    raise ValueError(
        f"the checkpoint holds no masks for {key}"
        + (f", but for {', '.join(others)}. Name the same networks as then." if others else ".")
        + ' To start from the dense networks in it, say initial_masks="magnitude"; to start from its weights with '
        "random masks, load them into the module and fit without ckpt_path."
    )


def check_unlimited(method: Method, training: SparseTraining) -> None:
    """Checks whether a method can work in a run whose length is unknown, and warns of what stays constant.

    Raises:
        ValueError: If the method is spread over the run's length.
    """
    unknown = "nothing but time limits this run (max_epochs, max_steps), so its length in generator updates is unknown"
    if method.needs_run_length:
        raise ValueError(f'{unknown}, and method="{method.name}" is spread over the run\'s length.')
    if training.mask_updates:
        rank_zero_warn(f"{unknown}: the exploration rate stays what it is at the start.")


def warn_of_raw_optimizers() -> None:
    """Warns that Lightning counts no steps."""
    rank_zero_warn(
        "the generator was updated and Trainer.global_step is still 0: the training step steps torch's own "
        "optimizers (trainer.optimizers, self.optimizers(use_pl_optimizer=False)), which Lightning does not "
        "count. ModelCheckpoint saves nothing until the run ends, and max_steps does not end it. Step what "
        "self.optimizers() returns."
    )
