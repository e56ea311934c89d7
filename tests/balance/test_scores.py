"""Which tensors of a discriminator's output are the scores."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_ddst.balance.scores import ScoreReader, average, average_all, check_is_score, get_scores


class Named(NamedTuple):
    logits: Tensor
    features: Tensor


@dataclass
class Judged:
    features: list[Tensor]
    logits: Tensor


A, B, C, D = (torch.tensor([value]) for value in (1.0, 2.0, 3.0, 4.0))


@pytest.mark.parametrize(
    ("output", "place", "values"),
    [
        (A, None, [1]),
        ([[[A]], "text", torch.tensor([7])], None, [1]),
        (A, "", [1]),
        ([A, B], -1, [2]),
        ([A, B], "-2", [1]),
        ([[A, B], [C, D]], "*.-1", [2, 4]),
        ([[A, B], [C, D]], 1, [3, 4]),
        ([[A, B], [C, D]], "-1.0", [3]),
        (([A, B], [[C], [D]]), "0.*", [1, 2]),
        ([{"logits": A, "features": B}, {"logits": C}], "*.logits", [1, 3]),
        ({"scores": [A, B], "features": C}, "scores", [1, 2]),
        ({"a.b": A, "a": {"b": B}}, "a.b", [1]),
        (Named(A, B), "logits", [1]),
        (Named(A, B), -2, [1]),
        (Judged([A, B], C), "logits", [3]),
        ([Judged([A, B], C), Judged([A, B], D)], "*.logits", [3, 4]),
        ([torch.tensor(1), {"features": B}], "1.features", [2]),
    ],
)
def test_scores_are_the_floating_point_tensors_at_their_place(output: Any, place: Any, values: list[float]) -> None:
    assert [score.item() for score in get_scores(output, place)] == values


@pytest.mark.parametrize("place", [2, "features", "1.scores", -3, "*.scores", "0.-1.5"])
def test_the_error_names_missing_scores(place: Any) -> None:
    output = [torch.ones(2), {"features": torch.ones(3)}]
    named = r" .* 0 \(2,\) torch.float32, 1.features \(3,\)"
    with pytest.raises(RuntimeError) as caught:
        get_scores(output, place)
    assert f"discriminator_output={place!r} is no tensor of floating-point numbers" in str(caught.value)
    assert "0 (2,) torch.float32, 1.features (3,)" in str(caught.value), named


def test_several_tensors_without_a_place_are_listed() -> None:
    with pytest.raises(RuntimeError) as caught:
        get_scores([[torch.ones(2, 8, 3)], {"logits": torch.ones(2, 1)}, torch.arange(2)], None)
    assert "returns 2 floating-point tensors" in str(caught.value)
    assert "0.0 (2, 8, 3) torch.float32, 1.logits (2, 1) torch.float32, 2 (2,) torch.int64" in str(caught.value)


def test_the_argument_names_one_place_or_two_or_a_difference() -> None:
    output = (A, [B, C])
    assert ScoreReader.of_argument(None).read(A) == [A]
    assert ScoreReader.of_argument(1).read(output) == ScoreReader.of_argument(1).read_real(output) == [B, C]
    both = ScoreReader.of_argument({"real": 0, "fake": 1})
    assert (both.read_real(output), both.read(output)) == ([A], [B, C])
    difference = ScoreReader.of_argument({"difference": "0"})
    assert difference.read(output) == difference.read_real(output) == [-A]


@pytest.mark.parametrize("argument", [{"real": 0}, {"fake": 0}, {}, {"real": 0, "fake": 1, "difference": 2}])
def test_other_kinds_of_images_are_rejected(argument: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"discriminator_output=\{.*\} must be a place"):
        ScoreReader.of_argument(argument)


@pytest.mark.parametrize("images", [(4, 1, 8, 8), (4, 16)])
def test_a_score_shaped_like_the_image_is_rejected(images: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"as many values as its images have, of shape \(4, .*reconstruction error"):
        check_is_score([torch.ones(4, 1), torch.ones(images)], torch.ones(images))
    with pytest.raises(RuntimeError, match="reconstruction error"):  # an autoencoder of flat images
        check_is_score([torch.ones(images).flatten(1)], torch.ones(images))


@pytest.mark.parametrize(
    ("score", "images"), [((4, 1), (4, 1)), ((4, 1, 3, 3), (4, 3, 8, 8)), ((4,), (4, 16)), ((4, 1, 8, 8), (4, 3, 8, 8))]
)
def test_patches_and_single_values_are_scores(score: tuple[int, ...], images: tuple[int, ...]) -> None:
    check_is_score([torch.ones(score)], torch.ones(images))


def test_the_mean_of_several_scores_is_that_of_their_means() -> None:
    assert average_all([torch.tensor([1.0, 3.0]), torch.tensor([[8.0]])]) == 5


def test_half_precision_is_averaged_in_32_bits_and_double_in_64() -> None:
    scores = torch.tensor([1.0, 2.0**-9], requires_grad=True)  # their sum has 10 bits
    assert average(scores.bfloat16()) == (1 + 2.0**-9) / 2
    assert average(scores.bfloat16()).dtype == torch.float32
    assert average(scores.double()).dtype == torch.float64
    assert not average(scores).requires_grad
