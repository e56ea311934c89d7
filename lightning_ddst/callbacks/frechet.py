"""The Frechet distance between generated and real images, on any features."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_ddst.callbacks.logs import generator_updates, log_scalars
from lightning_ddst.callbacks.networks import check_sample
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
        self._features = features.requires_grad_(False).eval()
        self._dtype = next((p.dtype for p in features.parameters()), torch.float32)
        self._reals: dict[bool, _Reals] = {}  # of testing, and of validation

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that the module can be sampled from."""
        check_sample(self, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepares for a pass over the real images."""
        if trainer.testing not in self._reals:
            self._reals[trainer.testing] = _Reals(self._features)
        reals = self._reals[trainer.testing]
        reals.metric.to(pl_module.device)
        reals.halves.to(pl_module.device)

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
        reals = self._reals[trainer.testing]
        if not reals.complete and not _partial(trainer):
            images = batch if isinstance(batch, Tensor) else batch[0]
            reals.add(images.to(self._dtype))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures and logs the distance."""
        if _partial(trainer):
            return
        reals = self._reals[trainer.testing]
        if not reals.complete:
            self.real_halves = float(reals.halves.compute())
            reals.complete = True
        updates = generator_updates(trainer)
        distance = self._measure(pl_module, reals.metric)
        self.history.append((updates, distance))
        name = f"frechet_distance/{self.name}"
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            log_scalars(trainer, {name: distance}, updates)
        if not trainer.sanity_checking:
            pl_module.log(name, distance, prog_bar=fitting, logger=not fitting)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def _measure(self, pl_module: LightningModule, metric: FrechetInceptionDistance) -> float:
        rng = torch.Generator().manual_seed(self._seed)
        total = self._samples or int(metric.real_features_num_samples)
        for done in range(0, total, self._batch_size):
            n = min(self._batch_size, total - done)
            metric.update(pl_module.sample(n, rng=rng).to(self._dtype), real=False)  # type: ignore[operator]
        distance = float(metric.compute())
        metric.reset()
        return distance

    @property
    def state_key(self) -> str:
        """A key of its own for distances on other features beside this one."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """What was measured."""
        return {"history": list(self.history)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what was measured before."""
        self.history = [(updates, distance) for updates, distance in state_dict["history"]]


class _Reals:
    """The statistics of a loader's real images, and of two halves of them: every other one."""

    def __init__(self, features: nn.Module) -> None:
        self.metric = FrechetInceptionDistance(feature=features, reset_real_features=False)
        self.halves = FrechetInceptionDistance(feature=features)
        self.complete = False
        self._seen = 0

    def add(self, images: Tensor) -> None:
        self.metric.update(images, real=True)
        for image_parity in (0, 1):
            half = images[(image_parity + self._seen) % 2 :: 2]
            if len(half):
                self.halves.update(half, real=image_parity == 0)
        self._seen += len(images)


def _partial(trainer: Trainer) -> bool:
    """Whether this is a sanity check on some of the images."""
    return trainer.sanity_checking and trainer.num_sanity_val_batches != trainer.num_val_batches
