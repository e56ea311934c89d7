"""Sample images in a run's loggers."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torchvision.utils import make_grid

from lightning_ddst.callbacks._support.last_fit import LastFit
from lightning_ddst.callbacks._support.validation_state import validation_state
from lightning_ddst.metrics.sources import check_below_zero, check_value_range, spans_wide
from lightning_ddst.utils.logging import generator_updates, log_image, shows_images
from lightning_ddst.utils.networks import check_sample, draw_samples
from lightning_ddst.utils.states import FLAG, check_state
from lightning_ddst.utils.validation import check_count


class SampleGrid(Callback):
    """A callback that logs a grid of samples from fixed noise to TensorBoard, as ``samples``, at every validation.

    In a fit without validation it does so at the ends of epochs. Weights & Biases and MLflow get it, too; for a
    CSVLogger it is a file in its folder. The module must have ``sample(n, rng=...)``, as `GANModule` does.

    Args:
        samples: Number of images.
        columns: Images per row.
        scale: Factor that enlarges small images: every pixel becomes a square of this size.
        seed: Seed of the noise.
        value_range: The values that are shown as black and as white, such as (0, 1). By default (-1, 1), but samples
            without any pixel below 0 are then an error, unless they are of about one value, or earlier ones had
            pixels below 0: pass (0, 1), or (-1, 1) to accept them.

    Raises:
        ValueError: If a number is not a positive integer, or `value_range` not two ascending numbers; when drawing,
            for images that look like images in [0, 1] while no range was given.
    """

    def __init__(
        self,
        samples: int = 64,
        columns: int = 8,
        scale: int = 1,
        seed: int = 0,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        for name, value in (("samples", samples), ("columns", columns), ("scale", scale)):
            check_count(name, value)
        self._samples = samples
        self._columns = columns
        self._scale = scale
        self._seed = seed
        self._value_range = check_value_range(value_range)
        self._last_fit = LastFit()
        self._dark = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that the module has a method `sample`; forgets another module's samples."""
        if self._last_fit.starts(pl_module, stage):
            self._dark = False
        check_sample(self, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generates and logs the grid in a fit without validation; training stays as it is."""
        if not trainer.enable_validation:
            with validation_state(trainer, pl_module), torch.no_grad(), isolate_rng(pl_module.device.type == "cuda"):
                self.on_validation_epoch_end(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generates and logs the grid."""
        if shows_images(trainer):
            images = draw_samples(pl_module, self._samples, torch.Generator().manual_seed(self._seed))
            if self._value_range is None and not self._dark and images.dim() == 4:
                low, high = float(images.min()), float(images.max())
                if spans_wide(low, high):
                    check_below_zero("samples", low, high)
                self._dark = low < 0  # a generator that collapses later may make bright images
            shown = self._value_range or (-1, 1)
            grid = make_grid(images.float(), nrow=self._columns, normalize=True, value_range=shown)
            grid = grid.repeat_interleave(self._scale, 1).repeat_interleave(self._scale, 2)
            pixels = (grid * 255).clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
            log_image(trainer, "samples", pixels, generator_updates(trainer))

    def state_dict(self) -> dict[str, bool]:
        """Returns whether samples had pixels below 0."""
        return {"dark": self._dark}

    def load_state_dict(self, state_dict: dict[str, bool]) -> None:
        """Restores the state returned by `state_dict`.

        Raises:
            ValueError: For another form of state.
        """
        check_state(self.state_key, state_dict, {"dark": FLAG})
        if self._last_fit.restores():
            self._dark = state_dict["dark"]
