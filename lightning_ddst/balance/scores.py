"""Reads scores in the output of a discriminator."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ddst.utils.nested import Place, describe_tensors, find_entries, tensors_in

ScorePlaces = Mapping[str, Place] | Place
"""Value of the argument `discriminator_output`."""


@dataclass(frozen=True)
class ScoreReader:
    """The places of scores in a discriminator's output.

    Attributes:
        place: Place of the scores of the images by which the generator is trained; None means the only floating-point
            tensor.
        real: Place of the scores of real images that the same call scored; None if a call scores images of one kind.
        difference: Whether a score is relativistic: how much more real the real images of the call look.
    """

    place: Place | None = None
    real: Place | None = None
    difference: bool = False

    @classmethod
    def of_argument(cls, argument: ScorePlaces | None) -> "ScoreReader":
        """Reads the argument `discriminator_output`.

        Raises:
            ValueError: For a mapping with other keys than "real" and "fake", or "difference".
        """
        if not isinstance(argument, Mapping):
            return cls(argument)
        if argument.keys() == {"real", "fake"}:
            return cls(argument["fake"], argument["real"])
        if argument.keys() == {"difference"}:
            return cls(argument["difference"], difference=True)
        raise ValueError(
            f"discriminator_output={dict(argument)} must be a place, two places {{'real': ..., 'fake': ...}} in what "
            "one call on both returns, or {'difference': ...} for a relativistic score."
        )

    def read(self, output: Any) -> list[Tensor]:
        """Returns the scores of the images by which the generator is trained; higher for images that look real.

        Raises:
            RuntimeError: If there are no such scores, or it is unknown which they are.
        """
        scores = get_scores(output, self.place)
        return [-score for score in scores] if self.difference else scores

    def read_real(self, output: Any) -> list[Tensor]:
        """Returns the scores of real images, which are at another place if one call scores both kinds.

        Raises:
            RuntimeError: If there are no such scores, or it is unknown which they are.
        """
        return self.read(output) if self.real is None else get_scores(output, self.real)


def get_scores(output: Any, place: Place | None) -> list[Tensor]:
    """Returns the scores in a discriminator's output: the floating-point tensors at a place.

    Args:
        output: The output.
        place: Place of the scores; None means the only floating-point tensor.

    Raises:
        RuntimeError: If there is no such tensor at that place, or several are there without a place.
    """
    try:
        entries = [output] if place is None else find_entries(output, place)
    except KeyError:
        entries = []
    scores = [tensor for entry in entries for _, tensor in tensors_in(entry) if tensor.is_floating_point()]
    returned = f"it returns {describe_tensors(output)}"
    if not scores:
        named = "there is" if place is None else f"discriminator_output={place!r} is"
        raise cannot_measure(
            f"{named} no tensor of floating-point numbers in what the discriminator returns; {returned}"
        )
    if place is None and len(scores) > 1:
        first = next(name for name, tensor in tensors_in(output) if tensor.is_floating_point())
        raise cannot_measure(
            f"the discriminator returns {len(scores)} floating-point tensors, and any could be the scores: name them, "
            f'`discriminator_output="{first}"` for example, or "*.-1" for the last of every list; {returned}'
        )
    return scores


def check_is_score(scores: Sequence[Tensor], images: Tensor) -> None:
    """Checks that scores are not images.

    Raises:
        RuntimeError: If a score has as many values as an image, more than one.
    """
    size = images.shape[1:].numel()
    if any(score.dim() > 0 and score.shape[1:].numel() == size > 1 for score in scores):
        raise cannot_measure(
            f"the discriminator returns as many values as its images have, of shape {tuple(images.shape)}: an "
            "autoencoder's (BEGAN) score is not the mean of its values, but a reconstruction error that only "
            "the training step knows"
        )


def average(scores: Tensor) -> Tensor:
    """Returns the mean score, in at least 32 bits, without gradients."""
    scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    return scores.mean() if scores.dim() else scores


def average_all(scores: Sequence[Tensor]) -> Tensor:
    """Returns the mean of several scores' means."""
    means = [average(score) for score in scores]
    return means[0] if len(means) == 1 else torch.stack(means).mean()


def cannot_measure(reason: str) -> RuntimeError:
    """Returns an error that explains why the balance ratio cannot be measured, and what to do."""
    return RuntimeError(
        f"the balance ratio cannot be measured: {reason}. Alternatively, give the module a "
        "method `balance_scores(self, batch)` that returns the discriminator's scores of real and of generated "
        "images (docs/attach.md)."
    )
