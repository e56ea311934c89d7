"""Metrics of features, compared with known values and with torch-fidelity's own."""

import math
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from lightning_ddst.metrics.statistics import LEAST, Comparison, InceptionScore, KeptFeatures, RealStatistics

CPU = torch.device("cpu")
RNG = 0


def normal(n: int, d: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def with_moments(mean: list[float], deviations: list[float], n: int = 200) -> Tensor:
    """Features of exactly this mean and these standard deviations, without correlations."""
    features = normal(n, len(mean)).double()
    features = features - features.mean(0)
    features = features @ torch.linalg.inv(torch.linalg.cholesky(features.T @ features / (n - 1))).T
    return features * torch.tensor(deviations) + torch.tensor(mean)


def compared(reals: Tensor, samples: Tensor, *metrics: str, kept: int = 10_000, batch: int = 37) -> dict[str, float]:
    statistics = RealStatistics(metrics, reals.shape[1], kept, RNG, CPU)
    for features in reals.split(batch):
        statistics.add(features)
    statistics.finish()
    comparison = Comparison(metrics, statistics, len(samples), kept, RNG, lambda features: features)
    for features in samples.split(batch):
        comparison.add(features)
    return comparison.compute()


# ---- values that are known -----------------------------------------------------------------------------


def test_the_frechet_distance_of_two_gaussians() -> None:
    first = with_moments([0.0, 1.0, 2.0], [1.0, 2.0, 3.0])
    second = with_moments([1.0, 1.0, 0.0], [2.0, 2.0, 1.0])
    # Squared differences of means, and of standard deviations where covariances are diagonal.
    assert compared(first, second, "frechet_distance") == {
        "frechet_distance": pytest.approx(1 + 4 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2)
    }


def test_the_kernel_distance_of_identical_and_of_distant_sets() -> None:
    reals = normal(500, 8)
    # Of identical sets the unbiased estimate is a bit below 0: images are no neighbours of themselves.
    assert compared(reals, reals, "kernel_distance")["kernel_distance"] == pytest.approx(0, abs=0.05)
    assert compared(reals, reals + 3, "kernel_distance")["kernel_distance"] > 1


def test_the_kernel_distance_by_hand() -> None:
    reals, samples = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])

    def kernel(x: float, y: float) -> float:
        return (x * y + 1) ** 3

    expected = kernel(0, 1) + kernel(2, 3) - 2 * (kernel(0, 2) + kernel(0, 3) + kernel(1, 2) + kernel(1, 3)) / 4
    assert compared(reals, samples, "kernel_distance")["kernel_distance"] == pytest.approx(expected)


def test_the_inception_score_of_nothing_known_and_of_everything_known() -> None:
    reals = normal(20)
    uniform = torch.zeros(100, 4)
    assert compared(reals, uniform, "inception_score")["inception_score"] == pytest.approx(1)
    one_hot = torch.eye(4).repeat(30, 1) * 1e4  # each class equally often in each part
    assert compared(reals, one_hot, "inception_score")["inception_score"] == pytest.approx(4)


def test_precision_and_recall_of_identical_and_of_disjoint_sets() -> None:
    reals = normal(50)
    assert compared(reals, reals.clone(), "precision", "recall") == {"precision": 1, "recall": 1}
    assert compared(reals, reals + 100, "precision", "recall") == {"precision": 0, "recall": 0}


def test_precision_and_recall_of_samples_from_a_part_of_the_reals() -> None:
    reals = torch.cat([normal(100), normal(100, seed=1) + 50])
    samples = normal(100, seed=2)
    both = compared(reals, samples, "precision", "recall")
    assert both["precision"] > 0.8
    assert 0.3 < both["recall"] <= 0.5  # none of the other half
    assert compared(reals, samples, "recall") == {"recall": both["recall"]}


# ---- as the libraries have them ------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "batch"), [(100, 7), (103, 103), (10, 3), (57, 1)])
def test_the_inception_score_is_torch_fidelitys(total: int, batch: int) -> None:
    logits = 3 * normal(total, 6)
    expected = isc_features_to_metric(logits, splits=10, shuffle=False)["inception_score_mean"]
    score = InceptionScore(total)
    for part in logits.split(batch):
        score.add(part)
    assert score.compute() == pytest.approx(expected, rel=1e-12)


def test_the_others_are_torch_fidelitys_on_the_same_features() -> None:
    reals, samples = normal(450, 6), 0.8 * normal(400, 6, seed=1)
    values = compared(reals, samples, *LEAST)
    kid = kid_features_to_metric(samples, reals, kid_subset_size=400, verbose=False)
    prc = prc_features_to_metric(samples, reals, verbose=False)
    assert values["kernel_distance"] == kid["kernel_inception_distance_mean"]
    assert (values["precision"], values["recall"]) == (prc["precision"], prc["recall"])
    assert list(values) == list(LEAST)


# ---- memory --------------------------------------------------------------------------------------------


def test_kept_features_are_bounded_and_a_fair_draw() -> None:
    counts = np.zeros(500)
    for seed in range(200):
        kept, added = KeptFeatures(50, seed), []
        for start in range(0, 500, 23):
            features = torch.arange(float(start), min(start + 23.0, 500.0))[:, None]
            added.append(weakref.ref(features))
            kept.add(features)
            del features
            held = [features for chunk in added if (features := chunk()) is not None]
            assert sum(map(len, held)) < 2 * 50
            del held
        features = kept.features()[:, 0]
        assert len(features) == len(features.unique()) == 50
        assert features.tolist() == sorted(features.tolist())
        counts[features.long().numpy()] += 1
    # 200 draws with probability 1/10: 20 each, with a standard deviation of 4.2.
    assert counts.mean() == 20
    assert 3.5 < counts.std() < 5
    assert abs(counts[:250].mean() - 20) < 1


def test_few_features_are_all_kept_whatever_the_batches() -> None:
    features = normal(80)
    for batch in (1, 7, 80):
        kept = KeptFeatures(80, RNG)
        for part in features.split(batch):
            kept.add(part)
        assert torch.equal(kept.features(), features)


def test_the_draw_is_the_same_every_time_whatever_the_batches() -> None:
    features = normal(300)
    drawn = []
    for batch in (7, 50, 300):
        kept = KeptFeatures(20, RNG)
        for part in features.split(batch):
            kept.add(part)
        drawn.append(kept.features())
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_real_statistics_do_not_grow() -> None:
    sizes = []
    for n in (100, 1000):
        statistics = RealStatistics(list(LEAST), 4, 50, RNG, CPU)
        for features in normal(n).split(25):
            statistics.add(features)
        statistics.finish()
        sizes.append(sum(tensor.numel() for tensor in statistics.state_dict().values()))
    assert sizes == [1 + 4 + 16 + 1 + 50 * 4] * 2


# ---- saving, and what is refused -----------------------------------------------------------------------


def test_saved_statistics_give_the_same_values() -> None:
    reals, samples = normal(60), normal(50, seed=1) + 0.3
    metrics = list(LEAST)
    first = RealStatistics(metrics, 4, 30, RNG, CPU)
    first.add(reals)
    first.finish()
    second = RealStatistics(metrics, 4, 30, RNG, CPU)
    second.load_state_dict(first.state_dict())
    values = []
    for statistics in (first, second, first):
        comparison = Comparison(metrics, statistics, 50, 30, RNG, lambda features: features)
        comparison.add(samples)
        values.append(comparison.compute())
    assert values[0] == values[1] == values[2]
    assert (first.count, first.halves) == (second.count, second.halves)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_samples_that_are_not_finite_make_everything_nan(broken: float) -> None:
    samples = normal(50)
    samples[20, 1] = broken
    values = compared(normal(60), samples, *LEAST)
    assert list(values) == list(LEAST)
    assert all(math.isnan(value) for value in values.values())


def test_real_images_that_are_not_finite_are_rejected() -> None:
    with pytest.raises(ValueError, match="features of real images are not finite"):
        compared(torch.full((8, 4), math.nan), normal(8), "frechet_distance")


def test_too_few_real_images_are_rejected() -> None:
    with pytest.raises(ValueError, match="3 real images are too few; the metrics need at least 4"):
        compared(normal(3), normal(8), "frechet_distance")
