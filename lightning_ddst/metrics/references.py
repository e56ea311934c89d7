"""Features of images, and the statistics of the real images' features, which are computed once."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ddst.metrics.sources import PixelRange, RealImages, in_turn
from lightning_ddst.metrics.statistics import MetricName, RealStatistics, keeps
from lightning_ddst.utils import distributed
from lightning_ddst.utils.cache import digest, load_tensors, save_tensors
from lightning_ddst.utils.nested import Place
from lightning_ddst.utils.progress import showing_progress


class FeatureExtraction:
    """Computes the features of images in all processes.

    Args:
        features: Module from images to features ``(batch, num_features)``, with the attribute `num_features`. It is
            frozen and put into evaluation mode.
        value_range: The lowest and the highest value of pixels; None is (-1, 1), to be checked.

    Attributes:
        features: The module.
        num_features: Number of features.
        value_range: The range.

    Raises:
        ValueError: If `features` has no number of features.
    """

    def __init__(self, features: nn.Module, value_range: tuple[float, float] | None) -> None:
        num_features = getattr(features, "num_features", None)
        if not isinstance(num_features, int):
            raise ValueError(f"features: {type(features).__name__} must have the attribute num_features, an integer.")
        self.features = features.requires_grad_(False).eval()
        self.num_features = num_features
        self.value_range = value_range
        self._dtype = next((p.dtype for p in features.parameters()), torch.float32)

    def extract(self, own: Iterator[Tensor], pixels: PixelRange, device: torch.device) -> Iterator[Tensor]:
        """Yields the features of all processes' images, ``(batch, num_features)``; NaN of images that are not finite.

        Args:
            own: This process's share of the images.
            pixels: Checks the range of their pixels.
            device: The device that computes.
        """

        def features_of(images: Tensor) -> Tensor:
            finite = images.flatten(1).isfinite().all(1)
            pixels.check(images[finite])
            features: Tensor = self.features(pixels.mapped(images.to(device)).to(self._dtype))
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            # An extractor may convert images to bytes, which are always finite.
            features = features.masked_fill(~finite.to(features.device)[:, None], float("nan"))
            return features.cpu() if distributed.is_distributed() else features

        return (features.to(device) for features in in_turn(map(features_of, own)))


class RealReferences:
    """The statistics of real images by their source, in memory and in a folder.

    Args:
        name: Name of the features.
        extraction: Computes the features.
        metrics: Names of the metrics that the statistics are for.
        kept: Largest number of images whose features are kept.
        seed: Seed of the choice of features to keep.
        cache: Folder for the statistics; None keeps them in memory only.
        real: Place of the images in a batch.
    """

    def __init__(
        self,
        name: str,
        extraction: FeatureExtraction,
        metrics: Sequence[MetricName],
        kept: int,
        seed: int,
        cache: Path | None,
        real: Place | None,
    ) -> None:
        self._name = name
        self._extraction = extraction
        self._metrics = tuple(metrics)
        self._kept = kept
        self._seed = seed
        self._cache = cache
        self._real = real
        self._known: dict[str, tuple[RealImages, RealStatistics]] = {}  # by source

    def find(
        self, trainer: Trainer, shape: Callable[[], torch.Size], loader: DataLoader[Any] | None
    ) -> tuple[RealImages, RealStatistics]:
        """Returns the real images of a fit or an evaluation and their statistics, computed if they are not known yet.

        Args:
            trainer: The Trainer.
            shape: Returns the shape of a sample, where images of a batch must be told from other tensors.
            loader: Loader of the real images, instead of the Trainer's validation or test data.
        """
        device = trainer.lightning_module.device
        images = RealImages(trainer, shape, loader, self._real)
        source = "loader" if loader is not None else "test" if trainer.testing else "validation"
        known, statistics = self._known.get(source, (None, None))
        if statistics is None or known is None or not images.same_as(known.datasets, known.count):
            statistics = RealStatistics(self._metrics, self._extraction.num_features, self._kept, self._seed, device)
            path = None if self._cache is None else self._path(trainer, images)
            state = distributed.broadcast(load_tensors(path) if path is not None and trainer.is_global_zero else None)
            if state is not None:
                statistics.load_state_dict(state)
            else:
                with showing_progress(trainer, f"{self._name}: real images", images.count) as step:
                    pixels = PixelRange("real images", self._extraction.value_range)
                    for features in self._extraction.extract(images.batches(), pixels, device):
                        statistics.add(features)
                        step(len(features))
                    pixels.finish("bright")
                statistics.finish()
                if path is not None and trainer.is_global_zero:
                    _try_to_save(path, statistics)
            self._known[source] = images, statistics
        if statistics.frechet is not None and device.type != "mps":
            statistics.frechet.to(device)
        return self._known[source]

    def _path(self, trainer: Trainer, images: RealImages) -> Path:
        assert self._cache is not None

        pixels = PixelRange("real images", self._extraction.value_range)

        def digests(batch: Tensor) -> list[str]:
            pixels.check(batch)
            return [digest(image) for image in batch.cpu()]

        every: list[str] = []
        with showing_progress(trainer, "digest of real images", images.count) as step:
            for batch in in_turn(map(digests, images.batches())):
                every += batch
                step(len(batch))
        pixels.finish("bright")
        features, value_range = self._extraction.features, self._extraction.value_range
        settings: list[Any] = [
            "frechet_distance" in self._metrics,
            (self._kept, self._seed) if keeps(self._metrics) else None,
        ]
        if value_range not in (None, (-1, 1)):
            settings.append(value_range)
        kind = type(features)
        extractor = [f"{kind.__module__}.{kind.__qualname__}", repr(features), features.state_dict()]
        return self._cache / f"{self._name.replace('/', '_')}-{digest(every, *extractor, settings)}.pt"


def _try_to_save(path: Path, statistics: RealStatistics) -> None:
    try:
        save_tensors(path, statistics.state_dict())
    except OSError as error:  # a full disk should not end a long run
        rank_zero_warn(f"the real images' statistics could not be written to {path}: {error}.")
