"""Quality of samples compared with real images, on any features."""

import random
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from lightning_ddst.callbacks._support.last_fit import LastFit
from lightning_ddst.callbacks._support.update_counter import UpdateCounter
from lightning_ddst.callbacks._support.validation_state import validation_state
from lightning_ddst.callbacks.ema import GeneratorEMA
from lightning_ddst.metrics.generator_inputs import GeneratorInputs
from lightning_ddst.metrics.references import FeatureExtraction, RealReferences
from lightning_ddst.metrics.sources import (
    PixelRange,
    check_value_range,
    sampled,
    training_images,
)
from lightning_ddst.metrics.statistics import LEAST, Comparison, MetricName, keeps
from lightning_ddst.utils import distributed
from lightning_ddst.utils.cache import check_writable
from lightning_ddst.utils.lightning_private import state_key
from lightning_ddst.utils.logging import generator_updates, log_scalars
from lightning_ddst.utils.nested import Place
from lightning_ddst.utils.networks import check_sample, find_network
from lightning_ddst.utils.progress import showing_progress
from lightning_ddst.utils.states import COUNT, FLAG, NUMBER, check_state, each, named, restoring
from lightning_ddst.utils.validation import check_choice, check_count

GeneratorWeights = Literal["average", "raw"]


class SampleQuality(Callback):
    """A callback that compares samples with real images.

    It measures after every pass over the validation or test loader; in a fit without validation, as of a plain GAN, at
    the ends of epochs, with the training data as the real images.

    - ``frechet_distance`` (Heusel et al. 2017), from torchmetrics. It is the FID only on Inception's features.
    - ``kernel_distance`` (Binkowski et al. 2018), from torch-fidelity, on 100 random subsets of up to 1,000 images.
      It is the KID only on Inception's features.
    - ``inception_score`` (Salimans et al. 2016) of the samples alone, as in torch-fidelity without shuffling. It needs
      features with logits, and is comparable with published scores only on Inception's.
    - ``precision`` and ``recall`` (Kynkaanniemi et al. 2019), from torch-fidelity, with 3 neighbors.

    Each is logged as ``<metric>/<name>``, for the generator's own weights as ``<metric>_raw/<name>``. Compare numbers
    only on the same features. The noise is the same every time, for both kinds of weights. Processes share the work and
    get the same numbers. Samples that are not finite make every metric NaN; those of another size than all real images
    are compared with a warning. Measuring does not change training.

    A module with a method ``sample(n, rng=...)``, as `GANModule` has it, makes samples that depend neither on the
    number of processes nor on training. For any other module, the callback records the different inputs of the
    generator's first calls in training, and repeats the generator's calls on them in evaluation mode. So it cannot
    measure before training, a generator must be one module, and its own output must be the images. Checkpoints hold
    the inputs.

    ``Trainer(num_sanity_val_steps=-1)`` also measures before training; a shorter sanity check measures nothing. The
    statistics of the real images are computed once, in a separate pass. Memory does not grow with the number of
    images.

    Args:
        features: Module from images, as the loader returns them, to features ``(batch, num_features)``. It has the
            attribute `num_features`, an integer, and, for the Inception Score, a method `logits` from features to
            ``(batch, classes)``. It is frozen and kept in evaluation mode. See `lightning_ddst.models` for
            Inception's and others.
        name: Name of the features.
        metrics: Names of the metrics to compute.
        generators: Weights to sample with: "average", the generator's weights in evaluation, which `GeneratorEMA`
            averages if it is used; "raw", the generator's own weights.
        samples: Number of samples; by default the number of real images. If inputs are recorded, it is by default at
            most 10,000, at most 64 MB of inputs, and at most the number of images made before the first measurement.
        batch_size: Samples generated at once.
        seed: Seed of the noise, and of the choice of features to keep.
        kept_features: Largest number of real images, and of samples, whose features the kernel distance, precision
            and recall use; drawn at random, always the same ones.
        cache: Folder for the statistics of the real images, so that they are computed once for all runs. A file's name
            is a digest of the images and of the extractor's class, weights and ``repr``; the ``repr`` must show any
            other setting that changes the features.
        value_range: The lowest and the highest value of pixels, of real images and samples alike, such as (0, 1) or
            (0, 255); they are mapped to [-1, 1] for the features. By default (-1, 1), but real images without any
            pixel below 0 are then an error, and so are such samples unless they are of about one value, or earlier
            ones had pixels below 0: pass (0, 1), or (-1, 1) to accept them.
        real: Place of the images in a batch of the loader: a key, an index, or a path such as "images.target". By
            default the only floating-point tensor, or of several the only one shaped like the samples.
        loader: Loader of the real images, instead of the validation, test or training data.
        every_n_epochs: Number of epochs between measurements in a fit without validation.
        every_n_updates: Number of generator updates between measurements in a fit, at the ends of batches. If it is
            given, a fit measures neither after validations nor at the ends of epochs.
        generator: Dotted name of the generator in the module; by default the usual names are tried. It is needed for
            modules without `sample`.

    Attributes:
        history: Every value with the number of generator updates before it, by metric as logged without ``/<name>``.
            A fit of another module begins anew. After a fit, evaluations of other modules and of checkpoints are not
            added.
        real_halves: The Frechet distance between two halves of the real images; None before they are seen. Distances
            near it are noise.

    Raises:
        ValueError: For an argument outside the allowed range; at the start, if the module has no `sample` and no
            generator is found, or if the features are made for images of another size than the data module's; when
            measuring, for images outside `value_range`, for batches whose images are missing or ambiguous, for too few
            real images or recorded inputs, or if the training data are a stream. The range is that of tensors
            with 4 dimensions only.
        TypeError: If a module without `sample` is evaluated before it was trained.
        OSError: At the start, if `cache` cannot be written to.
    """

    def __init__(
        self,
        features: nn.Module,
        name: str,
        metrics: Sequence[MetricName] = ("frechet_distance",),
        generators: Sequence[GeneratorWeights] = ("average",),
        samples: int | None = None,
        batch_size: int = 256,
        seed: int = 0,
        kept_features: int = 10_000,
        cache: str | Path | None = None,
        value_range: tuple[float, float] | None = None,
        real: Place | None = None,
        loader: DataLoader[Any] | None = None,
        every_n_epochs: int = 1,
        every_n_updates: int | None = None,
        generator: str | None = None,
    ) -> None:
        for argument, values, allowed in (("metrics", metrics, LEAST), ("generators", generators, ("average", "raw"))):
            _check_choices(argument, values, allowed)
        least = max(LEAST[metric] for metric in metrics)
        for argument, value in (("samples", samples), ("batch_size", batch_size), ("kept_features", kept_features)):
            if value is not None:
                check_count(argument, value)
                if value < least and (argument == "samples" or (argument == "kept_features" and keeps(metrics))):
                    raise ValueError(f"{argument}={value} must be at least {least} for {', '.join(metrics)}.")
        check_count("every_n_epochs", every_n_epochs)
        if every_n_updates is not None:
            check_count("every_n_updates", every_n_updates)
        if "inception_score" in metrics and not callable(getattr(features, "logits", None)):
            kind = type(features).__name__
            raise ValueError(f'metrics: "inception_score" needs features with a method logits; {kind} has none.')
        self.name = name
        self.history: dict[str, list[tuple[int, float]]] = {}
        self.real_halves: float | None = None
        self._metrics = tuple(metrics)
        self._generators = tuple(generators)
        self._samples = samples
        self._batch_size = batch_size
        self._seed = seed
        self._kept = kept_features
        self._cache = None if cache is None else Path(cache).expanduser()
        self._extraction = FeatureExtraction(features, check_value_range(value_range))
        self._references = RealReferences(name, self._extraction, self._metrics, kept_features, seed, self._cache, real)
        self._last_fit = LastFit()
        self._dark_samples = False  # whether samples had pixels below 0, in any evaluation
        self._loader = loader
        self._every_n_epochs = every_n_epochs
        self._every_n_updates = every_n_updates
        self._measured_at = 0
        self._training_images: DataLoader[Any] | None = None
        self._generator_name = generator
        self._generator: nn.Module | None = None
        self._inputs = GeneratorInputs(samples)
        self._counter: UpdateCounter | None = None
        self._handles: list[RemovableHandle] = []

    @property
    def names(self) -> list[str]:
        """The names under which metrics are logged: ``<metric>/<name>`` and ``<metric>_raw/<name>``."""
        suffixes = ["_raw" if generator == "raw" else "" for generator in self._generators]
        return [f"{metric}{suffix}/{self.name}" for metric in self._metrics for suffix in suffixes]

    @property
    def generator_updates(self) -> int | None:
        """The generator updates so far, where neither the module nor a `DynamicSparsityCallback` counts them."""
        return None if self._counter is None else self._counter.updates

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that the module can be sampled from and the arguments fit this run; forgets another module's."""
        if self._last_fit.starts(pl_module, stage):
            self.history, self._dark_samples, self._measured_at = {}, False, 0
            self._counter = None
            self._inputs.clear()
        if not _can_sample(pl_module):
            self._generator = self._find_generator(pl_module)
        self.check_data(getattr(trainer, "datamodule", None))
        if len(self._generators) > 1 and not _averages(trainer):
            raise ValueError("generators: average and raw are the same weights without a GeneratorEMA callback.")
        if self._cache is not None and trainer.is_global_zero:
            check_writable(self._cache)

    def _find_generator(self, pl_module: LightningModule) -> nn.Module:
        """Finds the generator of a module without a method `sample`."""
        try:
            return find_network(pl_module, "generator", self._generator_name)
        except ValueError as error:
            kind = type(pl_module).__name__
            raise ValueError(f"{error} Or give {kind} a method sample(n, rng=...), as GANModule has it.") from None

    def check_data(self, data: object) -> None:
        """Checks that the features are made for images of a data module's size and channels, as far as both name them.

        Args:
            data: A data module with the attributes `image_size` and `channels`, or anything else.

        Raises:
            ValueError: If the features' own attribute of the same name differs.
        """
        features = self._extraction.features
        for name in ("image_size", "channels"):
            own, size = getattr(features, name, None), getattr(data, name, None)
            if isinstance(own, int) and isinstance(size, int) and own != size:
                raise ValueError(
                    f"features={type(features).__name__} are made for images of {name}={own}, but those of "
                    f"{type(data).__name__} have {name}={size}: give SampleQuality other features, such as "
                    f"TorchvisionFeatures, which take images of any size."
                )

    # ---- when to measure -------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to record the generator's inputs, and to count its updates, where nothing else does."""
        self._detach()
        self._training_images = None
        counts = [getattr(each, "generator_updates", None) for each in (*trainer.callbacks, pl_module) if each != self]  # type: ignore[attr-defined]
        if self._generator is not None:
            self._handles = self._inputs.attach(self._generator)
        if all(count is None for count in counts):
            self._count_updates(pl_module)

    def _count_updates(self, pl_module: LightningModule) -> None:
        try:
            self._generator = find_network(pl_module, "generator", self._generator_name)
        except ValueError as error:
            distributed.warn(f"{self.name}: no generator updates are counted, and values are logged at 0: {error}")
        else:
            self._counter = self._counter or UpdateCounter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Records the generator's calls from here on, and follows optimizers that were made anew."""
        self._inputs.recording = bool(self._handles)
        if self._counter is not None and self._generator is not None:
            self._counter.follow(self._generator, trainer.optimizers)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Computes and logs the metrics every `every_n_updates`."""
        self._inputs.recording = False
        if self._counter is not None:
            self._counter.end_batch()
        if self._every_n_updates is not None:
            due = generator_updates(trainer) // self._every_n_updates
            if due > self._measured_at // self._every_n_updates:
                self._measure_in_training(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Computes and logs the metrics in a fit without validation."""
        plain = self._every_n_updates is None and not trainer.enable_validation
        if plain and (trainer.current_epoch + 1) % self._every_n_epochs == 0:
            self._measure_in_training(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Computes and logs the metrics."""
        if trainer.sanity_checking:
            if trainer.num_sanity_val_batches != trainer.num_val_batches or not _can_sample(pl_module):
                return
        elif trainer.state.fn == "fit" and self._every_n_updates is not None:
            return
        self._log(trainer, pl_module, self._computed(trainer, pl_module, self._loader))

    on_test_epoch_end = on_validation_epoch_end

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes every hook."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Removes every hook."""
        self._detach()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._counter is not None:
            self._counter.detach()

    def _measure_in_training(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measured_at = generator_updates(trainer)
        if self._loader is None and self._training_images is None:
            self._training_images = training_images(trainer)
        with validation_state(trainer, pl_module):
            values = self._computed(trainer, pl_module, self._loader or self._training_images)
        self._log(trainer, pl_module, values)

    def _computed(
        self, trainer: Trainer, pl_module: LightningModule, loader: DataLoader[Any] | None
    ) -> dict[str, float]:
        # Kept tensors may be used again outside torch's inference mode.
        with torch.inference_mode(False), torch.no_grad(), isolate_rng(pl_module.device.type == "cuda"):
            if loader is not None:  # training data may be augmented at random: alike in a resumed run
                random.seed(self._seed)
                np.random.seed(self._seed)  # noqa: NPY002
                torch.default_generator.manual_seed(self._seed)
            return self._measure(trainer, pl_module, loader)

    def _log(self, trainer: Trainer, pl_module: LightningModule, values: Mapping[str, float]) -> None:
        updates = generator_updates(trainer)
        if not self._last_fit.evaluates_another:
            for metric, value in values.items():
                self.history.setdefault(metric, []).append((updates, value))
        named = {f"{metric}/{self.name}": value for metric, value in values.items()}
        fitting = trainer.state.fn == "fit"
        if fitting:
            log_scalars(trainer, named, updates)
        if not trainer.sanity_checking:
            pl_module.log_dict(named, prog_bar=fitting, logger=not fitting)

    # ---- measuring -------------------------------------------------------------------------------------

    def _measure(
        self, trainer: Trainer, pl_module: LightningModule, loader: DataLoader[Any] | None
    ) -> dict[str, float]:
        extractor = self._extraction.features.to(pl_module.device).eval()
        images, reals = self._references.find(trainer, partial(self._sample_shape, pl_module), loader)
        self.real_halves = reals.halves
        total = self._count_samples(pl_module, reals.count)
        values: dict[str, float] = {}
        for generator in self._generators:
            suffix = "_raw" if generator == "raw" else ""
            comparison = Comparison(
                self._metrics, reals, total, self._kept, self._seed, getattr(extractor, "logits", None)
            )
            with ExitStack() as own_weights:
                for average in _averages(trainer) if generator == "raw" else []:
                    own_weights.enter_context(average.own_weights())
                samples = self._of_size(images.sizes, self._sampled(pl_module, total))
                with showing_progress(trainer, f"{self.name}: samples", total) as step:
                    pixels = PixelRange("samples", self._extraction.value_range)
                    for features in self._extraction.extract(samples, pixels, pl_module.device):
                        comparison.add(features)
                        step(len(features))
                    # A generator whose samples had dark pixels may collapse to bright ones.
                    pixels.finish("none" if self._dark_samples else "wide")
                    self._dark_samples |= pixels.dark
            with showing_progress(trainer, f"{self.name}: metrics", len(self._metrics)) as step:
                # One process computes: every process could, but they may share one machine's cores.
                computed = distributed.broadcast(
                    comparison.compute(partial(step, 1)) if distributed.get_rank() == 0 else {}
                )
            values |= {f"{metric}{suffix}": value for metric, value in computed.items()}
        return values

    def _count_samples(self, pl_module: LightningModule, reals: int) -> int:
        if _can_sample(pl_module):
            return self._samples or reals
        recorded = self._inputs.complete()
        if not recorded:
            check_sample(self, pl_module)  # raises
        total = self._samples or min(reals, recorded)
        if total > recorded:
            raise ValueError(
                f"samples={total}, but the generator made only {recorded} different images before the first "
                "measurement: give a smaller number, or measure later (every_n_epochs, every_n_updates)."
            )
        least = max(LEAST[metric] for metric in self._metrics)
        if total < least:
            raise ValueError(
                f"the generator made only {total} different images before the first measurement; "
                f"{', '.join(self._metrics)} needs {least}: measure later (every_n_epochs, every_n_updates)."
            )
        if total < reals and self._samples is None and not self.history:
            distributed.warn(
                f"{self.name}: {total:,} samples are compared with {reals:,} real images, because inputs of only so "
                "many were recorded before the first measurement; samples=... records more."
            )
        return total

    def _sampled(self, pl_module: LightningModule, total: int) -> Iterator[Tensor]:
        if _can_sample(pl_module):
            return sampled(pl_module, total, self._batch_size, self._seed)
        assert self._generator is not None
        return self._inputs.repeat(self._generator, total, self._seed, pl_module.device)

    def _of_size(self, sizes: Set[torch.Size], samples: Iterator[Tensor]) -> Iterator[Tensor]:
        """Warns at the first measurement if samples have another size than all real images."""
        for number, images in enumerate(samples):
            if sizes and not (number or self.history or images.shape[2:] in sizes):
                own, *theirs = ("x".join(map(str, size)) for size in (images.shape[2:], *sorted(sizes)[:3]))
                distributed.warn(
                    f"{self.name}: samples of size {own} are compared with real images of size {', '.join(theirs)}, "
                    "so the metrics measure the difference in size, too; resize one of them."
                )
            yield images

    def _sample_shape(self, pl_module: LightningModule) -> torch.Size:
        if _can_sample(pl_module):
            return next(sampled(pl_module, 2 * distributed.get_world_size(), 2, 0)).shape[1:]
        if not self._inputs.complete():
            check_sample(self, pl_module)  # raises
        assert self._generator is not None
        return self._inputs.shape(self._generator, pl_module.device)

    # ---- saving ----------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Key of the state; it holds the features' name, so several of these callbacks do not collide."""
        return state_key(self, name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Returns the measured values and, for a module without a method `sample`, the recorded inputs."""
        history = {metric: list(values) for metric, values in self.history.items()}
        state: dict[str, Any] = {"history": history, "dark_samples": self._dark_samples}
        if self._every_n_updates is not None:
            state["measured_at"] = self._measured_at
        if self._counter is not None:
            state["updates"] = self._counter.updates
        if self._handles or self._inputs.images:
            state["inputs"] = self._inputs.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state returned by `state_dict`.

        Raises:
            ValueError: For another form of state.
        """
        form = {"history": named(each((COUNT, NUMBER))), "dark_samples": FLAG}
        optional = {"measured_at": COUNT, "updates": COUNT, "inputs": GeneratorInputs.state_form}
        form |= {key: value for key, value in optional.items() if key in state_dict}
        check_state(self.state_key, state_dict, form)
        if not self._last_fit.restores():
            return
        self._dark_samples = state_dict["dark_samples"]
        self.history = {
            metric: [(updates, value) for updates, value in values] for metric, values in state_dict["history"].items()
        }
        self._measured_at = state_dict.get("measured_at", 0)
        if "updates" in state_dict:
            self._counter = self._counter or UpdateCounter()
            self._counter.updates = state_dict["updates"]
        if "inputs" in state_dict:
            with restoring(self.state_key):
                self._inputs.load_state_dict(state_dict["inputs"])


def _check_choices(argument: str, values: Sequence[str], allowed: Any) -> None:
    if isinstance(values, str) or not values or len(set(values)) < len(values):
        raise ValueError(f"{argument}={values!r} must be a list of different names out of {', '.join(allowed)}.")
    for value in values:
        check_choice(argument, value, allowed)


def _can_sample(module: LightningModule) -> bool:
    return callable(getattr(module, "sample", None))


def _averages(trainer: Trainer) -> list[GeneratorEMA]:
    return [callback for callback in trainer.callbacks if isinstance(callback, GeneratorEMA)]  # type: ignore[attr-defined]
