"""The base class for GANs with two optimizers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_ddst.gan.augmentation import DIFF_AUGMENTS, diff_augment
from lightning_ddst.gan.losses import LOSSES, gradient_penalty, r1_penalty
from lightning_ddst.gan.schedulers import SchedulerSteps
from lightning_ddst.utils import distributed
from lightning_ddst.utils.lightning_private import recount_batches, set_ddp_default
from lightning_ddst.utils.logging import log_scalars, logs_at
from lightning_ddst.utils.modules import eval_mode
from lightning_ddst.utils.nested import Place, describe_tensors, find_images, find_labels, get_tensor, tensors_in
from lightning_ddst.utils.states import COUNT, check_state
from lightning_ddst.utils.validation import check_count


def paper_adam(params: Any) -> Optimizer:
    """Makes the paper's optimizer: Adam, learning rate 2e-4, betas (0, 0.9), in torch's fused version."""
    # The other versions are slower on a CPU for inactive weights: torch's square root is slow at 0.
    return Adam(params, lr=2e-4, betas=(0.0, 0.9), fused=True)


if TYPE_CHECKING:
    _Module = LightningModule
else:
    _Module = object


class GANMixin(_Module):
    """All of `GANModule`, for a LightningModule of either package: the base class that follows in a subclass."""

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        loss: str = "hinge",
        discriminator_steps: int = 1,
        gradient_penalty: float | None = None,
        r1: float = 0.0,
        augment: Sequence[str] = (),
        num_classes: int | None = None,
        latent_dim: int | None = None,
        generator_optimizer: OptimizerCallable = paper_adam,
        discriminator_optimizer: OptimizerCallable = paper_adam,
        real: Place | None = None,
        labels: Place | None = None,
    ) -> None:
        super().__init__()
        self._loss = LOSSES.find("loss", loss)()
        check_count("discriminator_steps", discriminator_steps)
        if gradient_penalty is None:
            gradient_penalty = 10.0 if loss == "wasserstein" else 0.0
        for name, value in (("gradient_penalty", gradient_penalty), ("r1", r1)):
            if not value >= 0:  # also rejects NaN
                raise ValueError(f"{name}={value} must not be negative.")
        if isinstance(augment, str):
            raise ValueError(f"augment={augment!r} must be a list of names, such as ['color', 'cutout'].")
        for name in augment:
            DIFF_AUGMENTS.find("augment", name)
        latent_dim = getattr(generator, "latent_dim", None) if latent_dim is None else latent_dim
        if latent_dim is None:
            raise ValueError(f"latent_dim=None: {type(generator).__name__} has no latent_dim, so it must be given.")
        check_count("latent_dim", latent_dim)
        if num_classes is not None:
            check_count("num_classes", num_classes)
        self.automatic_optimization = False
        self.generator = generator
        self.discriminator = discriminator
        self.latent_dim = latent_dim
        self.num_classes = num_classes
        self.generator_updates = 0
        self._discriminator_updates = 0
        self._has_own_noise = False
        self._discriminator_steps = discriminator_steps
        self._gradient_penalty = gradient_penalty
        self._r1 = r1
        self._augment = tuple(augment)
        self._optimizers = (generator_optimizer, discriminator_optimizer)
        self._real = real
        self._labels = labels
        self._image_shape: torch.Size | None = None

    def configure_optimizers(self) -> tuple[list[Optimizer], list[Any]]:
        """Makes the generator's optimizer, then the discriminator's.

        Override it to return learning rate schedulers as well, in any form that Lightning allows; the module steps
        them.
        """
        generator_optimizer, discriminator_optimizer = self._optimizers
        return [
            generator_optimizer(self.generator.parameters()),
            discriminator_optimizer(self.discriminator.parameters()),
        ], []

    def configure_callbacks(self) -> list[Callback]:
        """Makes the callback that steps the schedulers of an overridden `configure_optimizers`."""
        inherited = getattr(self.configure_optimizers, "__func__", None) is GANMixin.configure_optimizers
        return [] if inherited else [SchedulerSteps(self)]

    # ---- several processes -----------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Configures DistributedDataParallel for backward passes that reach only one of the networks."""
        set_ddp_default(self.trainer, "find_unused_parameters", True)

    def on_fit_start(self) -> None:
        """Gives every process its own noise."""
        if distributed.is_distributed() and not self._has_own_noise:  # which another fit continues
            torch.manual_seed(torch.initial_seed() + distributed.get_rank())
            self._has_own_noise = True

    def on_train_start(self) -> None:
        """Corrects the Trainer's count of batches where a run resumes with another batch size."""
        recount_batches(self.trainer)

    # ---- generating ------------------------------------------------------------------------------------

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Generates images.

        Args:
            z: Noise, ``(batch, latent_dim)``.
            labels: Classes, int64 ``(batch,)``; for a conditional GAN only.
        """
        images: Tensor = self.generator(z) if labels is None else self.generator(z, labels)
        return images

    @torch.no_grad()
    def sample(self, n: int, labels: Tensor | None = None, rng: torch.Generator | None = None) -> Tensor:
        """Generates images in evaluation mode.

        Args:
            n: Number of images.
            labels: Their classes; by default drawn uniformly if the GAN is conditional.
            rng: CPU generator to draw from; by default torch's own.

        Returns:
            Images on the module's device.
        """
        with eval_mode(self.generator):
            z = torch.randn(n, self.latent_dim, generator=rng)
            labels = self._draw_labels(n, rng) if labels is None else labels
            images: Tensor = self(
                z.to(next(self.generator.parameters())), None if labels is None else labels.to(self.device)
            )
            return images

    def _draw_labels(self, n: int, rng: torch.Generator | None = None) -> Tensor | None:
        return None if self.num_classes is None else torch.randint(self.num_classes, (n,), generator=rng)

    def _generate(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Generates images and labels for a training step, as many as in the batch of real images."""
        z = torch.randn(len(like), self.latent_dim, device=like.device, dtype=like.dtype)
        labels = self._draw_labels(len(like))
        labels = None if labels is None else labels.to(like.device)
        return self(z, labels), labels

    # ---- training --------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Updates the discriminator, and every `discriminator_steps`-th time the generator."""
        if self.trainer.lr_scheduler_configs:
            self._check_schedulers()
        generator_optimizer, discriminator_optimizer = self.optimizers()  # type: ignore[attr-defined]
        real, labels = self._unpacked(batch)

        with self._toggled(discriminator_optimizer):
            loss = self.discriminator_loss(real, labels)
            discriminator_optimizer.zero_grad()
            self.manual_backward(loss)
            discriminator_optimizer.step()
        self._discriminator_updates += 1
        losses = {"loss/discriminator": loss.detach()}

        if self._discriminator_updates % self._discriminator_steps == 0:
            with self._toggled(generator_optimizer):
                loss = self.generator_loss(real)
                generator_optimizer.zero_grad()
                self.manual_backward(loss)
                generator_optimizer.step()
            self.generator_updates += 1
            losses["loss/generator"] = loss.detach()
            if logs_at(self.trainer, self.generator_updates):
                log_scalars(
                    self.trainer, {name: float(value) for name, value in losses.items()}, self.generator_updates
                )
        # Lightning reads what a bar shows in every batch, which waits for the device, even where there is no bar.
        self.log_dict(losses, prog_bar=self.trainer.progress_bar_callback is not None, logger=False)

    @contextmanager
    def _toggled(self, optimizer: Any) -> Iterator[None]:
        # LightningModule.toggled_optimizer is the same, from Lightning 2.6 on.
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    def _check_schedulers(self) -> None:
        if not any(isinstance(callback, SchedulerSteps) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                f"{type(self).__name__}.configure_callbacks must return [*super().configure_callbacks(), ...]: "
                "otherwise nothing steps the learning rate schedulers."
            )

    def discriminator_loss(self, real: Tensor, labels: Tensor | None) -> Tensor:
        """Computes the discriminator's loss with its penalties, for a batch of real images."""
        with torch.no_grad():
            fake, fake_labels = self._generate(real)
        loss = self._loss.discriminator(self._score(real, labels), self._score(fake, fake_labels))
        if self._gradient_penalty:
            loss = loss + self._gradient_penalty * gradient_penalty(lambda x: self._score(x, labels), real, fake)
        if self._r1:
            loss = loss + self._r1 * r1_penalty(lambda x: self._score(x, labels), real)
        return loss

    def generator_loss(self, real: Tensor) -> Tensor:
        """Computes the generator's loss, on as many images as in the batch of real images."""
        return self._loss.generator(self._score(*self._generate(real)))

    def _score(self, images: Tensor, labels: Tensor | None) -> Tensor:
        if self._augment:
            images = diff_augment(images, self._augment)
        scores: Tensor = self.discriminator(images) if self.num_classes is None else self.discriminator(images, labels)
        return scores

    def _unpacked(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        images = find_images(batch, self._real, self._generated_shape, "GANModule")
        if self.num_classes is None:
            return images, None
        labels = find_labels(batch, self._labels, images)
        if labels is None:
            raise ValueError(
                f"num_classes={self.num_classes}, but the batch holds no labels, integers with one entry per image. "
                f'Name them, GANModule(..., labels="..."), and the images, real="...". It holds '
                f"{describe_tensors(batch)}."
            )
        return images, labels

    @torch.no_grad()
    def _generated_shape(self) -> torch.Size:
        """Returns the shape of one generated image, from a call that leaves no trace."""
        if self._image_shape is None:
            rng = torch.Generator().manual_seed(0)
            with isolate_rng(self.device.type == "cuda"):
                self._image_shape = self.sample(2, rng=rng).shape[1:]
        return self._image_shape

    # ---- evaluation ------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Does nothing: callbacks compare the batch with samples."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Does nothing: callbacks compare the batch with samples."""

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """Generates as many images as the batch holds."""
        if self._real is not None:
            return self.sample(len(get_tensor(batch, "real", self._real)))
        sizes = [len(tensor) for _, tensor in tensors_in(batch) if tensor.dim()]
        if not sizes:
            raise ValueError(
                f'real=None: the batch of type {type(batch).__name__} holds no tensor. Name the images, real="...".'
            )
        return self.sample(sizes[0])

    # ---- saving ----------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the counts of updates."""
        checkpoint["gan_updates"] = (self.generator_updates, self._discriminator_updates)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the counts of updates.

        Raises:
            ValueError: For counts of another form.
        """
        counts = checkpoint.get("gan_updates", (0, 0))  # the checkpoint may be of another module
        check_state(type(self).__name__, {"gan_updates": counts}, {"gan_updates": (COUNT, COUNT)})
        self.generator_updates, self._discriminator_updates = counts


class GANModule(GANMixin, LightningModule):
    """A generator and a discriminator, trained in turn by manual optimization.

    Every batch makes one discriminator update; every `discriminator_steps`-th batch also makes a generator
    update. To change a step, override `discriminator_loss` or `generator_loss`.

    Learning rate schedulers that a subclass returns from `configure_optimizers` are stepped, as Lightning does it in
    automatic optimization: do not call their ``step()``. With ``"interval": "step"`` they step after the updates of
    their own optimizer, every `frequency`-th one; with "epoch", the default, at the ends of epochs, before validation.
    ReduceLROnPlateau reads its `monitor` among the logged metrics, after validation.

    Batches are images, or any nesting of mappings, tuples, lists and dataclasses that holds images and labels; images
    are ``(batch, channels, ...)`` floats in the generator's range, labels int64 ``(batch,)``.

    Args:
        generator: Module from noise ``(batch, latent_dim)``, and labels if `num_classes` is given, to images.
        discriminator: Module from images, and labels if `num_classes` is given, to scores.
        loss: "hinge", "non-saturating", "wasserstein", "least-squares", or another key of
            `lightning_ddst.gan.losses.LOSSES`.
        discriminator_steps: Discriminator updates per generator update.
        gradient_penalty: Weight of the gradient penalty; by default 10 with the Wasserstein loss, else 0.
        r1: Weight of the R1 penalty.
        augment: Random augmentations of all images that the discriminator is trained on, real and generated
            (DiffAugment): a list of "color", "translation", "cutout", or other keys of
            `lightning_ddst.gan.augmentation.DIFF_AUGMENTS`. The balance ratio is measured without them.
        num_classes: Number of classes of a conditional GAN; None for an unconditional GAN.
        latent_dim: Size of the noise; by default ``generator.latent_dim``.
        generator_optimizer: Function from parameters to the generator's optimizer.
        discriminator_optimizer: Function from parameters to the discriminator's optimizer.
        real: Place of the real images in a batch: a key, an index, or a path such as "images.target". By default the
            only floating-point tensor, or of several the only one shaped like the generator's output.
        labels: Place of the labels in a batch. By default the second entry of a list or tuple of two, else the only
            tensor of integers with one entry per image.

    Attributes:
        generator_updates: Generator updates so far.

    Raises:
        ValueError: For an argument outside the allowed range; in training, for a batch whose images or labels are
            missing or ambiguous, and for a scheduler whose `monitor` is not logged, or that other code steps, too.
    """
