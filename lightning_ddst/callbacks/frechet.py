"""The Frechet distance between generated and real images, on any features."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_ddst.callbacks.logs import generator_updates, log_scalars
from lightning_ddst.sparsity.checks import check_count


class FrechetDistance(Callback):
    """Compares samples with the images of the validation or test loader after every pass over them.

    It is logged as ``frechet_distance/<name>``: a Frechet distance is a number on its features, and
    only one on Inception's is called FID. The module must have ``sample(n, rng=...)``, as
    `GANModule` does; the noise is the same every time.

    ``Trainer(num_sanity_val_steps=-1)`` measures before training, too.

    Args:
        features: From images, as the loader gives them, to features ``(batch, num_features)``; has
            the attribute `num_features`. It is frozen and kept in evaluation mode.
        name: Of the features.
        samples: Number of samples; by default as many as there are real images.
        batch_size: Samples generated at once.
        seed: Of the noise.

    Attributes:
        history: Every distance measured, with the generator updates before it.
        real_halves: The distance between two halves of the real images, None until they were seen:
            what is left at about this size is noise.

    Raises:
        ValueError: If `samples` or `batch_size` is not a positive integer.
    """

    def __init__(
        self, features: nn.Module, name: str, samples: int | None = None, batch_size: int = 256, seed: int = 0
    ) -> None:
        for argument, value in (("samples", samples), ("batch_size", batch_size)):
            if value is not None:
                check_count(argument, value)
        self.name = name
        self.history: list[tuple[int, float]] = []
        self.real_halves: float | None = None
        self._samples = samples
        self._batch_size = batch_size
        self._seed = seed
        features.requires_grad_(False).eval()
        self._metric = FrechetInceptionDistance(feature=features, reset_real_features=False)
        self._halves = FrechetInceptionDistance(feature=features)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that the module can be sampled from."""
        if not callable(getattr(pl_module, "sample", None)):
            raise TypeError(
                f"FrechetDistance needs {type(pl_module).__name__}.sample(n, rng=...), as GANModule has it."
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepares for a pass over the real images."""
        self._metric.to(pl_module.device)
        self._halves.to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds real images, the first time they are seen."""
        if self.real_halves is None and not _partial(trainer):
            images = batch if isinstance(batch, Tensor) else batch[0]
            self._metric.update(images, real=True)
            self._halves.update(images[::2], real=True)
            self._halves.update(images[1::2], real=False)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures and logs the distance."""
        if _partial(trainer):
            return
        if self.real_halves is None:
            self.real_halves = float(self._halves.compute())
        updates = generator_updates(trainer)
        distance = self._measure(pl_module)
        self.history.append((updates, distance))
        log_scalars(trainer, {f"frechet_distance/{self.name}": distance}, updates)
        if not trainer.sanity_checking:
            pl_module.log(f"frechet_distance/{self.name}", distance, prog_bar=True, logger=False)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def _measure(self, pl_module: LightningModule) -> float:
        rng = torch.Generator().manual_seed(self._seed)
        total = self._samples or int(self._metric.real_features_num_samples)
        for done in range(0, total, self._batch_size):
            n = min(self._batch_size, total - done)
            self._metric.update(pl_module.sample(n, rng=rng), real=False)  # type: ignore[operator]
        distance = float(self._metric.compute())
        self._metric.reset()
        return distance


def _partial(trainer: Trainer) -> bool:
    """Whether this is a sanity check on some of the images."""
    return trainer.sanity_checking and trainer.num_sanity_val_batches != trainer.num_val_batches
