"""Spectral norm after a mask change."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_POWER_ITERATIONS = 30


@dataclass(frozen=True)
class SpectralVectors:
    """The buffers in which spectral norm keeps a weight's leading singular vectors.

    Attributes:
        owner: The module that holds the buffers.
        u: Name of the left vector's buffer, shape ``(rows,)``.
        v: Name of the right vector's buffer, shape ``(columns,)``.
        dim: Dimension of the weight that becomes the rows.
        eps: Smallest norm that is divided by.
    """

    owner: nn.Module
    u: str
    v: str
    dim: int
    eps: float

    def vectors(self) -> tuple[Tensor, Tensor]:
        """The left and the right vector, shapes ``(rows,)`` and ``(columns,)``."""
        return self.owner.get_buffer(self.u), self.owner.get_buffer(self.v)

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Recomputes the vectors, in place, for a weight that changed by much more than one step.

        Spectral norm follows its weight by one power iteration a step, so after a mask change the
        normalised weight would have a spectral norm other than 1 for many steps.

        Args:
            weight: The masked weight before normalisation.
        """
        old_u, old_v = self.vectors()
        matrix = weight.movedim(self.dim, 0).flatten(1).float()
        # A little noise: pruning may leave the old vector orthogonal to every row that is left.
        noise = torch.randn(len(old_u), generator=torch.Generator().manual_seed(0)).to(matrix)
        u = F.normalize(old_u.float() + 0.1 * F.normalize(noise, dim=0), dim=0, eps=self.eps)
        for _ in range(_POWER_ITERATIONS):
            v = F.normalize(matrix.t() @ u, dim=0, eps=self.eps)
            u = F.normalize(matrix @ v, dim=0, eps=self.eps)
        old_u.data.copy_(u)  # past autograd's version counter, as the masks' changes are
        old_v.data.copy_(v)
