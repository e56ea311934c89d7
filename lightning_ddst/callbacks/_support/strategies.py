"""Which of Lightning's strategies masks can be held under, and what their precision does to gradients."""

from collections.abc import Callable

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def check_strategy(trainer: Trainer) -> None:
    """Refuses strategies that masks were not made for.

    Raises:
        ValueError: For anything but a single device, DistributedDataParallel, and FSDP2 by ModelParallelStrategy.
    """
    strategy = trainer.strategy
    known = isinstance(strategy, DDPStrategy | SingleDeviceStrategy | ModelParallelStrategy)
    if not known or isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            f"{type(strategy).__name__} keeps parameters in a form that cannot be masked: use "
            'Trainer(strategy="ddp_find_unused_parameters_true"), ModelParallelStrategy with fully_shard, or a single '
            "device."
        )


def loads_late(trainer: Trainer) -> bool:
    """Whether checkpoints are loaded only after fitting has started, into parameters that are split by then."""
    return trainer.strategy.restore_checkpoint_after_setup


def check_backward_passes(trainer: Trainer) -> None:
    """Refuses settings of DistributedDataParallel under which a GAN cannot train.

    Raises:
        ValueError: If it expects that every backward pass reaches all parameters.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy) and (parts := strategy.device_mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            f"tensor_parallel_size={parts} splits single layers' arithmetic, which measuring BR does not allow for: "
            "use ModelParallelStrategy(tensor_parallel_size=1, data_parallel_size=...)."
        )
    model = strategy.model
    if isinstance(model, DistributedDataParallel) and (not model.find_unused_parameters or model.static_graph):
        raise ValueError(
            "DistributedDataParallel as it is set up expects that every backward pass reaches all parameters, and "
            "a GAN's reach one of its networks or both in turn: use "
            'Trainer(strategy="ddp_find_unused_parameters_true") (a GANModule works with "ddp", too).'
        )


def make_unscaler(trainer: Trainer) -> Callable[[Tensor], Tensor]:
    """Returns what copies a gradient without the scale of fp16's loss, where there is one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return torch.clone
    return lambda gradient: gradient / scaler.scale(torch.ones((), device=gradient.device))
