"""Detects that training has broken down."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from lightning_ddst.balance.ratio import Balance
from lightning_ddst.sparsity.launches import all_finite, read
from lightning_ddst.utils import distributed
from lightning_ddst.utils.states import COUNT, TEXT, Form, named

_WINDOWS = 10
"""Consecutive windows without a balance ratio after which this is reported."""


class Divergence:
    """A detector of states that a GAN does not recover from; it reports each kind once.

    - Weights that are not finite, as after a loss that was NaN or infinite.
    - A discriminator that gives real images and fakes before and after the update the same score over a whole window.
    - A balance ratio that is undefined for 10 consecutive windows.

    Args:
        networks: The generator and the discriminator, by role.
    """

    state_form: ClassVar[Form] = {"reports": named((COUNT, TEXT)), "finite_until": COUNT, "undefined": COUNT}
    """The form of `state_dict`."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self._reports: dict[str, tuple[int, str]] = {}  # by kind
        self._networks = dict(networks)
        self._finite_until = 0
        self._undefined = 0

    @property
    def reports(self) -> list[tuple[int, str]]:
        """All reports so far, each with its generator update."""
        return list(self._reports.values())

    def finite(self, updates: int) -> bool:
        """Returns whether all weights are finite, and reports weights that are not; waits for the device.

        Args:
            updates: Generator updates so far.
        """
        if updates == self._finite_until:
            return True  # checked already
        finite = read(
            [
                all_finite([parameter for parameter in network.parameters() if parameter.is_floating_point()])
                for network in self._networks.values()
            ]
        )
        ours = zip(self._networks, finite, strict=True)
        broken = [role for role, flags in ours if not all(distributed.all_gather(all(flags)))]
        if broken:
            self._report(
                "weights",
                updates,
                f"weights of the {' and of the '.join(broken)} are not finite: after generator update "
                f"{self._finite_until} a loss or a gradient was NaN or infinite. Masks stay as they are.",
            )
            return False
        self._finite_until = updates
        return True

    def look_at(self, balance: Balance, updates: int) -> None:
        """Checks a whole window of measurements.

        Args:
            balance: The balance over the window.
            updates: Generator updates so far.
        """
        if balance.scores_are_constant:
            self._report(
                "constant",
                updates,
                f"the discriminator gives everything the same score, {balance.real:.4g}: for {balance.samples} "
                "measurements it has not told real images from generated ones at all.",
            )
        self._undefined = 0 if balance.ratio is not None else self._undefined + 1
        if self._undefined == _WINDOWS:
            self._report(
                "undefined",
                updates,
                f"the balance ratio has been undefined for {_WINDOWS} windows in a row ({balance.reason}).",
            )

    def _report(self, kind: str, updates: int, message: str) -> None:
        self._reports.setdefault(kind, (updates, message))

    def state_dict(self) -> dict[str, Any]:
        """Returns reports and counters; loads with ``weights_only=True``."""
        return {"reports": dict(self._reports), "finite_until": self._finite_until, "undefined": self._undefined}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state returned by `state_dict`."""
        self._reports = dict(state["reports"])
        self._finite_until, self._undefined = state["finite_until"], state["undefined"]
