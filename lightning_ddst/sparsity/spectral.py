"""Spectral norm, before and after a mask change."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm as _SpectralNormHook

from lightning_ddst.sparsity.sharding import full_tensor


@dataclass(frozen=True)
class SpectralVectors:
    """The leading singular vectors that one of torch's two spectral norms keeps for a weight.

    Attributes:
        parameter: The weight before normalisation.
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
        """The left and the right vector, shapes ``(rows,)`` and ``(columns,)``."""
        return self.owner.get_buffer(self.u), self.owner.get_buffer(self.v)

    @torch.no_grad()
    def refresh(self) -> None:
        """Recomputes the vectors, in place, after the weight changed by much more than one step.

        Spectral norm follows its weight by one power iteration a step, so after a mask change the
        normalised weight would have a spectral norm other than 1 for many steps.
        """
        matrix = full_tensor(self.parameter.detach()).movedim(self.dim, 0).flatten(1).float()
        if not matrix.isfinite().all():
            return  # training has diverged, and no vectors would help
        # Without empty rows and columns: so many eigenvalues of 0 can keep LAPACK from converging.
        rows, columns = matrix.any(1), matrix.any(0)
        matrix = matrix[rows][:, columns]
        if not matrix.numel():
            return  # nothing is active
        wide = matrix.shape[0] <= matrix.shape[1]
        with torch.autocast(matrix.device.type, enabled=False):  # masks change inside of the training step
            gram = matrix @ matrix.t() if wide else matrix.t() @ matrix
            leading = torch.linalg.eigh(gram).eigenvectors[:, -1]  # eigenvalues ascend
            other = nn.functional.normalize((matrix.t() if wide else matrix) @ leading, dim=0)
        found = (leading, other) if wide else (other, leading)
        for buffer, vector, present in zip(self.vectors(), found, (rows, columns), strict=True):
            # Past autograd's version counter, as the masks' changes are.
            buffer.data.zero_().masked_scatter_(present, vector.to(buffer.dtype))


def spectral_norms(network: nn.Module) -> Iterator[SpectralVectors]:
    """Finds every weight of a network that is under spectral norm, of whatever kind its layer is."""
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
