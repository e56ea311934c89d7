"""Masks that never change, and no masks at all: the baselines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lightning_ddst.methods.base import ROLES, MaskUpdate, Method, Role, training_method


@training_method("dense")
@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """Dense training: no weight is masked; the densities are ignored."""

    generator_density: float = 1.0
    starts_dense: ClassVar[bool] = True

    @property
    def final_densities(self) -> dict[Role, float]:
        """The density 1 of both networks, which stay dense."""
        return dict.fromkeys(ROLES, 1.0)

    def mask_updates(self) -> Sequence[MaskUpdate]:
        """Returns an empty tuple."""
        return ()


@training_method("static")
@dataclass(frozen=True, kw_only=True)
class Static(Method):
    """Random masks that never change: the static baseline of DDST."""

    def mask_updates(self) -> Sequence[MaskUpdate]:
        """Returns an empty tuple."""
        return ()
