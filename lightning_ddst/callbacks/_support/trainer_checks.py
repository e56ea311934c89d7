"""Checks of checkpoints that a Trainer loads, and of the optimizers that it counts."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_ddst.attached.checks import check_method
from lightning_ddst.methods import Method


def check_checkpoint(saved: Mapping[str, Any], key: str, method: Method, *, needs_masks: bool) -> None:
    """Checks that a run can resume from a checkpoint.

    Args:
        saved: The states of callbacks in the checkpoint, by their keys.
        key: The key of the callback that resumes.
        method: The method of the callback that resumes.
        needs_masks: Whether the checkpoint must hold masks.

    Raises:
        ValueError: If another method's run saved the checkpoint, or it holds no masks.
    """
    check_method(saved.get(key, {}), method)
    if saved.get(key) or not needs_masks:
        return
    others = [other for other in saved if other.startswith(key.partition("{")[0])]
    raise ValueError(
        f"the checkpoint holds no masks for {key}"
        + (f", but for {', '.join(others)}. Name the same networks as in that run." if others else ".")
        + ' To start from its dense networks, set initial_masks="magnitude"; to start from its weights with '
        "random masks, load them into the module and fit without ckpt_path."
    )


def warn_of_raw_optimizers() -> None:
    """Warns that Lightning does not count optimizer steps."""
    rank_zero_warn(
        "the generator was updated but Trainer.global_step is still 0: the training step steps torch's own "
        "optimizers (trainer.optimizers, self.optimizers(use_pl_optimizer=False)), which Lightning does not "
        "count. ModelCheckpoint saves nothing until the run ends, and max_steps does not end it. Step the optimizers "
        "that self.optimizers() returns."
    )
