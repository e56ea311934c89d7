"""Checks of a Trainer: the checkpoint that it loads, averages that ignore masks, and the optimizers that it counts."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_ddst.attached.checks import check_method
from lightning_ddst.methods import Method
from lightning_ddst.utils.lightning_packages import is_a
from lightning_ddst.utils.networks import get_parts

_INSTEAD = "`GeneratorEMA` averages only the generator and respects masks; use it instead."
_WRITERS = {
    "WeightAveraging": "does not respect changing masks: its average makes every weight that was ever active "
    f"non-zero, averages the discriminator too, and counts the steps of both optimizers. {_INSTEAD}",
    "StochasticWeightAveraging": f"writes averages into the weights at the end, outside the masks. {_INSTEAD}",
    "ModelPruning": "replaces the weights by masked copies, which these masks do not reach. Leave it out.",
}
"""Callbacks of Lightning that average or change weights without the masks, and the reason to reject each."""


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


def restores_start(trainer: Trainer, checkpoint: Mapping[str, Any]) -> bool:
    """Returns whether a tuner of Lightning restores the start of a run, after trials without the other callbacks.

    Args:
        trainer: The Trainer.
        checkpoint: The checkpoint that it loads.
    """
    finders = ("BatchSizeFinder", "LearningRateFinder")  # a Tuner adds one for the time
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return not checkpoint.get("global_step") and any(is_a(each, name) for each in callbacks for name in finders)


def check_other_averages(trainer: Trainer, module: nn.Module, generator: nn.Module) -> None:
    """Rejects averages and pruning that ignore masks, for a generator whose masks change.

    Raises:
        ValueError: If a callback of Lightning that averages or prunes weights is used, or the module holds torch's
            AveragedModel of the generator.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind in type(callback).__mro__:
            if kind.__name__ in _WRITERS:
                raise ValueError(f"{type(callback).__name__} {_WRITERS[kind.__name__]}")
    shapes = [{n: parameter.shape for n, parameter in part.named_parameters()} for part in get_parts(generator)]
    for name, average in module.named_modules():
        if isinstance(average, AveragedModel):
            averaged = {n: parameter.shape for n, parameter in average.module.named_parameters()}
            if averaged in shapes:
                raise ValueError(
                    f"{name}, torch's AveragedModel of the generator, does not respect changing masks: its average "
                    f"makes every weight that was ever active non-zero. {_INSTEAD}"
                )


def shows_summary(trainer: Trainer) -> bool:
    """Returns whether the Trainer prints a summary of the model, unless ``enable_model_summary=False``."""
    return any(is_a(callback, "ModelSummary") for callback in trainer.callbacks)  # type: ignore[attr-defined]


def warn_of_raw_optimizers() -> None:
    """Warns that Lightning does not count optimizer steps."""
    rank_zero_warn(
        "the generator was updated but Trainer.global_step is still 0: the training step steps torch's own "
        "optimizers (trainer.optimizers, self.optimizers(use_pl_optimizer=False)), which Lightning does not "
        "count. ModelCheckpoint saves nothing until the run ends, and max_steps does not end it. Step the optimizers "
        "that self.optimizers() returns."
    )
