"""Checks of Lightning's strategies, and the gradient scale of mixed precision."""

from lightning.pytorch import Trainer
from torch.nn.parallel import DistributedDataParallel

from lightning_ddst.sparsity.dense_gradients import Unscaled, unscale_by
from lightning_ddst.utils.lightning_packages import is_a

_SUPPORTED = ("DDPStrategy", "SingleDeviceStrategy", "ModelParallelStrategy")


def check_strategy(trainer: Trainer) -> None:
    """Rejects strategies that do not support masks.

    Raises:
        ValueError: Unless the strategy is a single device, DistributedDataParallel, or ModelParallelStrategy (FSDP2).
    """
    strategy = trainer.strategy
    if not any(is_a(strategy, name) for name in _SUPPORTED) or is_a(strategy, "DeepSpeedStrategy"):
        raise ValueError(
            f"{type(strategy).__name__} keeps parameters in a form that cannot be masked: use "
            'Trainer(strategy="ddp_find_unused_parameters_true"), ModelParallelStrategy with fully_shard, or a single '
            "device."
        )


def loads_late(trainer: Trainer) -> bool:
    """Returns whether the strategy loads checkpoints after the start of fitting, into sharded parameters."""
    return trainer.strategy.restore_checkpoint_after_setup


def check_backward_passes(trainer: Trainer) -> None:
    """Rejects settings of a strategy under which a GAN cannot train.

    Raises:
        ValueError: If DistributedDataParallel expects every backward pass to reach all parameters, or tensor
            parallelism splits layers.
    """
    strategy = trainer.strategy
    meshes = getattr(strategy, "device_mesh", None) if is_a(strategy, "ModelParallelStrategy") else None
    if meshes is not None and (parts := meshes["tensor_parallel"].size()) > 1:
        raise ValueError(
            f"tensor_parallel_size={parts} splits single layers' arithmetic, which measuring BR does not support: "
            "use ModelParallelStrategy(tensor_parallel_size=1, data_parallel_size=...)."
        )
    model = strategy.model
    if isinstance(model, DistributedDataParallel) and (not model.find_unused_parameters or model.static_graph):
        raise ValueError(
            "DistributedDataParallel, as set up here, expects every backward pass to reach all parameters, but "
            "a GAN's backward passes reach one network or both in turn: use "
            'Trainer(strategy="ddp_find_unused_parameters_true") (a GANModule works with "ddp", too).'
        )


def make_unscaler(trainer: Trainer) -> Unscaled:
    """Returns a function that copies a gradient and removes the loss scale of fp16, if there is one."""
    return unscale_by(getattr(trainer.precision_plugin, "scaler", None))
