"""Sample images in TensorBoard."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torchvision.utils import make_grid

from lightning_ddst.utils.logging import generator_updates, tensorboards
from lightning_ddst.utils.networks import check_sample
from lightning_ddst.utils.validation import check_count


class SampleGrid(Callback):
    """A callback that logs a grid of samples from fixed noise to TensorBoard, as ``samples``, at every validation.

    The module must have ``sample(n, rng=...)``, as `GANModule` does, and return images in [-1, 1].

    Args:
        samples: Number of images.
        columns: Images per row.
        scale: Factor that enlarges small images: every pixel becomes a square of this size.
        seed: Seed of the noise.

    Raises:
        ValueError: If a number is not a positive integer.
    """

    def __init__(self, samples: int = 64, columns: int = 8, scale: int = 1, seed: int = 0) -> None:
        for name, value in (("samples", samples), ("columns", columns), ("scale", scale)):
            check_count(name, value)
        self._samples = samples
        self._columns = columns
        self._scale = scale
        self._seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that the module has a method `sample`."""
        check_sample(self, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generates and logs the grid."""
        writers = tensorboards(trainer)
        if writers:
            images = pl_module.sample(self._samples, rng=torch.Generator().manual_seed(self._seed))  # type: ignore[operator]
            grid = make_grid(images.float(), nrow=self._columns, normalize=True, value_range=(-1, 1))
            grid = grid.repeat_interleave(self._scale, 1).repeat_interleave(self._scale, 2)
            for writer in writers:
                writer.add_image("samples", grid, generator_updates(trainer))
