"""Statistics that compare the features of two sets of images, in constant memory."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

MetricName = Literal["frechet_distance", "kernel_distance", "inception_score", "precision", "recall"]

LEAST: Mapping[str, int] = {
    "frechet_distance": 4,  # two in each half of the real images
    "kernel_distance": 2,
    "inception_score": 10,  # one per split
    "precision": 4,  # an image and its three neighbors
    "recall": 4,
}
"""Smallest number of images that each metric needs."""

_ON_KEPT = ("kernel_distance", "precision", "recall")
_KID_SUBSET = 1000
_NEIGHBORS = 3
_BLOCK = 1000  # of distances
_SPLITS = 10


def keeps(metrics: Collection[str]) -> bool:
    """Returns whether metrics need single images' features, not only their sums."""
    return any(metric in metrics for metric in _ON_KEPT)


# torchmetrics' KernelInceptionDistance holds all features (400 MB for 50,000 of Inception's), and draws its subsets
# from the global random state.
class KeptFeatures:
    """A uniformly random subset of a stream of features, in the order of the stream (reservoir sampling).

    Each feature draws a random number; those with the largest numbers are kept.

    Args:
        limit: Size of the subset; up to about twice as many features are held in between.
        seed: Seed of the random numbers.
    """

    def __init__(self, limit: int, seed: int) -> None:
        self._limit = limit
        self._rng = torch.Generator().manual_seed(seed)
        self._numbers: list[Tensor] = []
        self._features: list[Tensor] = []

    def add(self, features: Tensor) -> None:
        """Adds features ``(n, num_features)``, on any device."""
        self._numbers.append(torch.rand(len(features), generator=self._rng, dtype=torch.float64))
        self._features.append(features.cpu())
        if sum(map(len, self._features)) >= 2 * self._limit:
            self._reduce()

    def features(self) -> Tensor:
        """Returns the subset, on the CPU; all features if they were fewer."""
        self._reduce()
        return self._features[0]

    def _reduce(self) -> None:
        numbers, features = torch.cat(self._numbers), torch.cat(self._features)
        if len(features) > self._limit:
            chosen = numbers.topk(self._limit).indices.sort().values
            numbers, features = numbers[chosen], features[chosen]
        self._numbers, self._features = [numbers], [features]


# torchmetrics and torch-fidelity hold all logits: 200 MB for 50,000 of Inception's, and copies in double precision in
# torch-fidelity. torchmetrics also shuffles them by the global random state.
class InceptionScore:
    """The Inception Score (Salimans et al. 2016), averaged over 10 consecutive parts of the images.

    Equals torch-fidelity's without shuffling: ``exp`` of the mean KL divergence between an image's classes and all.

    Args:
        total: Number of images that will be added, at least 10.
    """

    def __init__(self, total: int) -> None:
        self._ends = torch.tensor([(part + 1) * total // _SPLITS for part in range(_SPLITS)])
        self._seen = 0
        self._probabilities: Tensor | None = None
        self._negative_entropies = torch.zeros(_SPLITS, dtype=torch.float64)

    def add(self, logits: Tensor) -> None:
        """Adds the next images' logits ``(n, classes)``."""
        logits = logits.double()
        parts = torch.searchsorted(self._ends, torch.arange(self._seen, self._seen + len(logits)), right=True)
        self._seen += len(logits)
        logarithms = logits.log_softmax(1)
        probabilities = logarithms.exp()
        if self._probabilities is None:
            self._probabilities = torch.zeros(_SPLITS, logits.shape[1], dtype=torch.float64)
        self._probabilities.index_add_(0, parts, probabilities.cpu())
        self._negative_entropies.index_add_(0, parts, torch.xlogy(probabilities, probabilities).sum(1).cpu())

    def compute(self) -> float:
        """Returns the score, from 1 to the number of classes."""
        assert self._probabilities is not None
        counts = self._ends.diff(prepend=self._ends.new_zeros(1))
        means = self._probabilities / counts[:, None]
        divergences = self._negative_entropies / counts - torch.xlogy(means, means).sum(1)
        return float(divergences.exp().mean())


class RealStatistics:
    """Statistics of the real images that metrics need.

    Args:
        metrics: Names of the metrics.
        num_features: Number of features.
        kept_features: Largest number of images whose features are kept, if a metric needs them.
        seed: Seed of the choice of these images.
        device: Device of the sums.

    Attributes:
        count: Number of images.
        halves: Frechet distance between the even and the odd images; None without this metric.
        frechet: torchmetrics' metric with the real images' sums; None without this metric.
        kept: The kept features; None if no metric needs them.
    """

    def __init__(
        self, metrics: Sequence[str], num_features: int, kept_features: int, seed: int, device: torch.device
    ) -> None:
        self.count = 0
        self.halves: float | None = None
        self.kept: Tensor | None = None
        self.frechet: FrechetInceptionDistance | None = None
        if "frechet_distance" in metrics:
            identity = nn.Identity()  # as torchmetrics' feature extractor: it gets features
            identity.num_features = num_features  # type: ignore[assignment]
            # Every process gets all features.
            self.frechet = FrechetInceptionDistance(identity, reset_real_features=False, sync_on_compute=False)
            # Its sums are in double precision, which Apple's GPUs lack.
            self.frechet.to("cpu" if device.type == "mps" else device)
        self._least = max(LEAST[metric] for metric in metrics)
        self._keeping = KeptFeatures(kept_features, seed) if keeps(metrics) else None

    def add(self, features: Tensor) -> None:
        """Adds features ``(n, num_features)``.

        Raises:
            ValueError: If a feature is not finite.
        """
        if not features.isfinite().all():
            raise ValueError("features of real images are not finite.")
        if self.frechet is not None:
            features_there = features.to(self.frechet.device)
            for parity in (0, 1):
                half = features_there[(parity + self.count) % 2 :: 2]
                if len(half):
                    self.frechet.update(half, real=parity == 0)
        if self._keeping is not None:
            self._keeping.add(features)
        self.count += len(features)

    def finish(self) -> None:
        """Computes the attributes, after the last image.

        Raises:
            ValueError: If there were too few images.
        """
        if self.count < self._least:
            raise ValueError(f"{self.count} real images are too few; the metrics need at least {self._least}.")
        if self.frechet is not None:
            self.halves = float(self.frechet.compute())
            for sums in ("features_sum", "features_cov_sum", "features_num_samples"):
                real = getattr(self.frechet, f"real_{sums}")
                setattr(self.frechet, f"real_{sums}", real + getattr(self.frechet, f"fake_{sums}"))
            self.frechet.reset()
        if self._keeping is not None:
            self.kept = self._keeping.features()
            self._keeping = None

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the statistics, to be saved."""
        state = {"count": torch.tensor(self.count)}
        if self.frechet is not None:
            state["sum"] = self.frechet.real_features_sum
            state["products"] = self.frechet.real_features_cov_sum
            state["halves"] = torch.tensor(self.halves, dtype=torch.float64)
        if self.kept is not None:
            state["kept"] = self.kept
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores the state returned by `state_dict` for the same arguments."""
        self.count = int(state["count"])
        if self.frechet is not None:
            device = self.frechet.device
            self.frechet.real_features_sum = state["sum"].to(device)
            self.frechet.real_features_cov_sum = state["products"].to(device)
            self.frechet.real_features_num_samples = state["count"].to(device)
            self.halves = float(state["halves"])
        self.kept = state.get("kept")
        self._keeping = None


class Comparison:
    """A comparison of samples with real images by several metrics.

    Args:
        metrics: Names of the metrics.
        reals: Statistics of the real images.
        total: Number of samples that will be added.
        kept_features: Largest number of samples whose features are kept, if a metric needs them.
        seed: Seed of the choice of these samples.
        logits: Function from features to logits; needed by the Inception Score.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        reals: RealStatistics,
        total: int,
        kept_features: int,
        seed: int,
        logits: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._metrics = metrics
        self._reals = reals
        self._finite = True
        self._keeping = KeptFeatures(kept_features, seed) if keeps(metrics) else None
        self._score = InceptionScore(total) if "inception_score" in metrics else None
        self._logits = logits
        if reals.frechet is not None:
            reals.frechet.reset()  # removes the sums of earlier samples

    def add(self, features: Tensor) -> None:
        """Adds samples' features ``(n, num_features)``."""
        # Eigenvalues of matrices that are not finite raise an error, and on some machines crash the process.
        self._finite &= bool(features.isfinite().all())
        if self._reals.frechet is not None:
            self._reals.frechet.update(features.to(self._reals.frechet.device), real=False)
        if self._keeping is not None:
            self._keeping.add(features)
        if self._score is not None:
            assert self._logits is not None
            self._score.add(self._logits(features))

    def compute(self, done: Callable[[], object] = lambda: None) -> dict[str, float]:
        """Computes the metrics by name; all are NaN if a feature was not finite.

        Args:
            done: Called after each metric.
        """
        values: dict[str, float] = {}
        for metric in self._metrics:
            if metric not in values:  # precision and recall are computed together
                values |= self._compute(metric) if self._finite else {metric: float("nan")}
            done()
        return {metric: values[metric] for metric in self._metrics}

    def _compute(self, metric: str) -> dict[str, float]:
        if metric == "frechet_distance":
            assert self._reals.frechet is not None
            return {metric: float(self._reals.frechet.compute())}
        if metric == "inception_score":
            assert self._score is not None
            return {metric: self._score.compute()}
        assert self._keeping is not None
        assert self._reals.kept is not None
        samples, reals = self._keeping.features().float(), self._reals.kept.float()
        if metric == "kernel_distance":
            size = min(_KID_SUBSET, len(samples), len(reals))
            computed = kid_features_to_metric(samples, reals, kid_subset_size=size, verbose=False)
            return {metric: computed[KEY_METRIC_KID_MEAN]}
        computed = prc_features_to_metric(
            samples, reals, prc_neighborhood=_NEIGHBORS, prc_batch_size=_BLOCK, save_cpu_ram=True, verbose=False
        )
        return {"precision": computed[KEY_METRIC_PRECISION], "recall": computed[KEY_METRIC_RECALL]}
