"""Which of Lightning's strategies masks can be held under."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch.nn.parallel import DistributedDataParallel


def check_strategy(trainer: Trainer) -> None:
    """Refuses strategies that split parameters.

    Raises:
        ValueError: For anything but a single device and DistributedDataParallel.
    """
    strategy = trainer.strategy
    replicates = isinstance(strategy, DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
    if not replicates and not isinstance(strategy, SingleDeviceStrategy):
        raise ValueError(
            f"{type(strategy).__name__} splits parameters over processes, and masks need whole ones: use "
            'Trainer(strategy="ddp_find_unused_parameters_true"), or a single device.'
        )


def check_backward_passes(trainer: Trainer) -> None:
    """Refuses settings of DistributedDataParallel under which a GAN cannot train.

    Raises:
        ValueError: If it expects that every backward pass reaches all parameters.
    """
    model = trainer.strategy.model
    if isinstance(model, DistributedDataParallel) and (not model.find_unused_parameters or model.static_graph):
        raise ValueError(
            "DistributedDataParallel as it is set up expects that every backward pass reaches all parameters, and "
            "a GAN's reach one of its networks or both in turn: use "
            'Trainer(strategy="ddp_find_unused_parameters_true") (a GANModule works with "ddp", too).'
        )
