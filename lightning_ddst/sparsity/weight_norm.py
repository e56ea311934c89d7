"""Weight norm, ``w = g v / |v|`` (Salimans and Kingma 2016), whose v is masked.

`torch.nn.utils.weight_norm` and `torch.nn.utils.parametrizations.weight_norm` both compute a weight w from two
parameters. A norm |v| is that of one slice of v, or of all of v; its entries are one group.

- An inactive entry of v is 0, so the effective weight w is 0 there, as long as |v| is not. So every group keeps an
  entry that is not 0.
- Entries are compared by w: groups differ in g / |v|.
- The gradient of v is ``g / |v| (dL/dw - (dL/dw . v) v / |v|^2)``. The second term is 0 where v is, so an inactive
  entry has ``dL/dw = dL/dv |v| / g``. (For an active one this is the part of its gradient that turns v.)
- Pruning makes |v| smaller. The same factor for g leaves the other entries of w what they were. An entry that grows
  starts with v = 0 and changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class WeightNorm:
    """The two parameters of one weight under weight norm.

    Attributes:
        g: The norms of the weight: one entry for each group, of any shape that broadcasts to the weight's.
        v: The direction of the weight, of its shape; masks are masks of v.
        dim: The dimension whose indices are the groups; None if all entries are one group.
    """

    g: nn.Parameter
    v: nn.Parameter
    dim: int | None

    @classmethod
    def make(cls, g: nn.Parameter, v: nn.Parameter, dim: int) -> "WeightNorm":
        """Makes it from the dimension as torch's two implementations keep it; -1 means all entries."""
        return cls(g, v, None if dim == -1 else dim % v.dim())

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.g.numel()

    def is_same(self, other: "WeightNorm | None") -> bool:
        """Returns whether another one has the same parameters and groups."""
        return other is not None and self.g is other.g and self.v is other.v and self.dim == other.dim

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """Returns |v| of every group, of g's shape; float32 or wider."""
        return group_lengths(self.v, self.dim).view_as(self.g)

    @torch.no_grad()
    def effective(self) -> Tensor:
        """Returns the effective weight ``g v / |v|``."""
        return self.v * (self.g / self.lengths()).to(self.v.dtype)

    @torch.no_grad()
    def effective_gradient(self, gradient: Tensor) -> Tensor:
        """Returns the gradient of the effective weight where v is 0, from the gradient of v; 0 where g is 0."""
        factors = torch.where(self.g == 0, 0, self.lengths() / self.g)
        return gradient * factors.to(gradient.dtype)

    @torch.no_grad()
    def rescale(self, before: Tensor) -> None:
        """Scales g so that the remaining entries keep their effective weights.

        Args:
            before: The result of `lengths` before entries of v were set to 0.
        """
        rescale(self.g.data, before, self.lengths())  # bypasses autograd's version counter, as mask changes do

    @torch.no_grad()
    def best(self, scores: Tensor) -> Tensor:
        """Marks the largest score of every group, among entries where v is not 0.

        Args:
            scores: Finite scores of v's shape.

        Returns:
            A bool tensor of v's shape with one true entry in each group, on the scores' device.
        """
        scores = scores.masked_fill((self.v == 0).to(scores.device), float("-inf"))
        moved = scores if self.dim is None else scores.movedim(self.dim, 0)
        rows = moved.reshape(self.groups, -1)
        marks = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, rows.argmax(1, keepdim=True), True)
        best: Tensor = marks.view(moved.shape)
        if self.dim is not None:
            best = best.movedim(0, self.dim)
        return best

    def best_active(self, mask: Tensor) -> Tensor:
        """Marks the active entry of every group that is never pruned, the largest."""
        return self.best(self.v.detach().abs() * mask)


def rescale(g: Tensor, before: Tensor, after: Tensor) -> None:
    """Scales g in place for lengths of v that have changed; groups of length 0 keep theirs."""
    g.mul_(torch.where(before > 0, after / before, 1).to(g.dtype))


def group_lengths(v: Tensor, dim: int | None) -> Tensor:
    """Returns the norm of every group of v, with its dimensions kept; float32 or wider."""
    others: Sequence[int] = [i for i in range(v.dim()) if i != dim]
    dtype = torch.promote_types(v.dtype, torch.float32)
    lengths: Tensor = torch.linalg.vector_norm(v.detach(), dim=others, keepdim=True, dtype=dtype)
    return lengths
