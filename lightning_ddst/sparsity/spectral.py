"""The singular vectors of spectral norm, and their update after a mask change."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm as _SpectralNormHook

from lightning_ddst.sparsity.launches import join, unjoin
from lightning_ddst.sparsity.sharding import full_tensor
from lightning_ddst.utils.devices import is_launch_bound

_SQUARINGS = 10
_SCALED_EVERY = 3
"""Squarings between two scalings: the largest entries of a matrix of 1,000 rows shrink to 1e-12 in between."""


@dataclass(frozen=True)
class SpectralVectors:
    """The leading singular vectors of a weight in one of torch's two implementations of spectral norm.

    Attributes:
        parameter: The weight before normalization.
        owner: The module that holds the vectors as buffers.
        u: Name of the left vector's buffer, shape ``(rows,)``.
        v: Name of the right vector's buffer, shape ``(columns,)``.
        dim: Dimension of the weight that becomes the rows.
    """

    parameter: nn.Parameter
    owner: nn.Module
    u: str
    v: str
    dim: int

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Returns the left and the right vector, shapes ``(rows,)`` and ``(columns,)``."""
        return self.owner.get_buffer(self.u), self.owner.get_buffer(self.v)

    def matrix(self) -> Tensor:
        """Returns the full weight as a matrix, float32."""
        return full_tensor(self.parameter.detach()).movedim(self.dim, 0).flatten(1).float()

    @torch.no_grad()
    def refresh(self) -> None:
        """Recomputes the vectors in place; `refresh_all` does so for several weights."""
        matrix = self.matrix()
        if not matrix.isfinite().all():
            return  # training has diverged; no vectors exist
        # Removes empty rows and columns: many eigenvalues of 0 can prevent LAPACK from converging.
        rows, columns = matrix.any(1), matrix.any(0)
        matrix = matrix[rows][:, columns]
        if not matrix.numel():
            return  # no weight is active
        wide = matrix.shape[0] <= matrix.shape[1]
        with torch.autocast(matrix.device.type, enabled=False):  # masks change inside the training step
            gram = matrix @ matrix.t() if wide else matrix.t() @ matrix
            leading = torch.linalg.eigh(gram).eigenvectors[:, -1]  # eigenvalues ascend
            other = nn.functional.normalize((matrix.t() if wide else matrix) @ leading, dim=0)
        found = (leading, other) if wide else (other, leading)
        for buffer, vector, present in zip(self.vectors(), found, (rows, columns), strict=True):
            # Bypasses autograd's version counter, as mask changes do.
            buffer.data.zero_().masked_scatter_(present, vector.to(buffer.dtype))


@torch.no_grad()
def refresh_all(norms: Sequence[SpectralVectors]) -> None:
    """Recomputes the vectors of weights in place, after these have changed by much more than one step.

    Spectral norm makes one power iteration per step, so without this the normalized weight would have a spectral norm
    other than 1 for many steps after a mask change. The vectors of a weight that is 0, or not finite, stay.
    """
    if norms and is_launch_bound(norms[0].parameter.device):
        _refresh_by_squaring(norms)
        return
    for spectral in norms:
        spectral.refresh()


def _refresh_by_squaring(norms: Sequence[SpectralVectors]) -> None:
    """Does so without waiting for the device, which an eigendecomposition does.

    The powers of ``M^T M`` tend to a multiple of ``v v^T``. Each squaring doubles the exponent, so that ten of them are
    1024 power iterations.
    """
    matrices = [spectral.matrix() for spectral in norms]
    wide = [matrix.shape[0] <= matrix.shape[1] for matrix in matrices]
    tall = [matrix.t() if is_wide else matrix for matrix, is_wide in zip(matrices, wide, strict=True)]
    with torch.autocast(tall[0].device.type, enabled=False):  # masks change inside the training step
        powers = [matrix.t() @ matrix for matrix in tall]
        norms_of_powers = torch._foreach_norm(powers)
        for number in range(_SQUARINGS):
            if number % _SCALED_EVERY == 0:
                powers = [power.div_(n) for power, n in zip(powers, torch._foreach_norm(powers), strict=True)]
            powers = [power @ power for power in powers]
        # Every column is a multiple of the vector; the longest one has the largest entry on the diagonal.
        leading = [power.index_select(1, power.diagonal().argmax().view(1)).squeeze(1) for power in powers]
        others = [matrix @ vector for matrix, vector in zip(tall, leading, strict=True)]
    pairs = zip(leading, others, wide, strict=True)
    found = [vector for one, other, is_wide in pairs for vector in ((one, other) if is_wide else (other, one))]
    buffers = [vector for spectral in norms for vector in spectral.vectors()]
    lengths = _repeat(torch._foreach_norm(found), found)
    sizes = _repeat([size for size in norms_of_powers for _ in range(2)], found)
    exists = (sizes > 0).logical_and_(sizes < float("inf"))
    values = torch.where(exists, join(found).div_(lengths), join(buffers))
    # Bypasses autograd's version counter, as mask changes do.
    torch._foreach_copy_([buffer.data for buffer in buffers], unjoin(values, buffers))


def _repeat(numbers: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
    """Returns each number as often as a vector has entries, in one tensor."""
    return torch.cat([number.expand_as(vector) for number, vector in zip(numbers, vectors, strict=True)])


def spectral_norms(network: nn.Module) -> Iterator[SpectralVectors]:
    """Yields the vectors of every weight under spectral norm in a network, for any kind of layer."""
    for module in network.modules():
        if parametrize.is_parametrized(module):
            for chain in module.parametrizations.values():  # type: ignore[operator]
                for norm in chain:
                    if isinstance(norm, _SpectralNorm) and len(chain) == 1:
                        yield SpectralVectors(chain.original, norm, "_u", "_v", norm.dim)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _SpectralNormHook):
                parameter = module.get_parameter(f"{hook.name}_orig")
                yield SpectralVectors(parameter, module, f"{hook.name}_u", f"{hook.name}_v", hook.dim)
