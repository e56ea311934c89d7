"""An exponential moving average of a network's weights that knows of masks."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ddst.sparsity.checks import check_choice
from lightning_ddst.sparsity.maskable import MaskableWeight, maskable_weights

BufferHandling = Literal["average", "copy"]


class WeightAverage:
    """Averages a network's parameters over training.

    A parameter's average is the plain mean of its values until that spans ``1 / (1 - decay)``
    updates, and exponential from then on. Each maskable weight has its own age: one that is exactly
    0 is inactive or grew just now, so its average is 0 and starts anew with its next value. So an
    inactive weight is 0 in the average, and a grown one is not dragged down by its past zeros.

    Args:
        network: Its parameters are read, and only `swap` writes them.
        decay: In [0, 1).
        buffers: "average" treats floating-point buffers (BatchNorm's statistics) like parameters;
            "copy" takes the network's present ones.

    Raises:
        ValueError: For an argument outside what is allowed.
    """

    def __init__(self, network: nn.Module, decay: float = 0.999, buffers: BufferHandling = "average") -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be in [0, 1).")
        check_choice("buffers", buffers, ("average", "copy"))
        self.updates = 0
        self._decay = decay
        self._live: dict[str, Tensor] = dict(network.named_parameters())
        if buffers == "average":
            self._live |= {name: b for name, b in network.named_buffers() if b.is_floating_point()}
        weights: list[MaskableWeight] = []
        with suppress(ValueError):  # a network without maskable weights is averaged all the same
            weights = maskable_weights(network)
        # Spectral norm's vectors are not averaged: an average of unit vectors is shorter than 1.
        self._normalized = [weight for weight in weights if weight.spectral is not None]
        vectors = {id(vector) for weight in self._normalized if weight.spectral for vector in weight.spectral.vectors()}
        self._vectors = {name: buffer for name, buffer in network.named_buffers() if id(buffer) in vectors}
        self._live |= self._vectors
        self._averages = {name: value.detach().clone() for name, value in self._live.items()}
        self._ages = {w.name: torch.zeros_like(w.parameter, dtype=torch.float32) for w in weights}
        self._swapped = False

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the present values."""
        decay = min(self._decay, self.updates / (self.updates + 1))
        self.updates += 1
        for name, average in self._averages.items():
            value = self._live[name].detach()
            if name in self._vectors:
                average.copy_(value)
            elif (age := self._ages.get(name)) is not None:
                decays = (age / (age + 1)).clamp_(max=self._decay).to(average.dtype)
                average.sub_(value).mul_(decays).add_(value)
                inactive = value == 0
                average.masked_fill_(inactive, 0)
                age.add_(1).masked_fill_(inactive, 0)
            else:
                average.lerp_(value, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the network's values and the averages; a second call puts them back."""
        for name, average in self._averages.items():
            live = self._live[name].detach()
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)
        self._swapped = not self._swapped
        if self._swapped:
            for weight in self._normalized:
                if weight.spectral is not None:
                    weight.spectral.refresh(weight.parameter.detach())

    @property
    def swapped(self) -> bool:
        """Whether the network has the averages at present."""
        return self._swapped

    def values(self) -> dict[str, Tensor]:
        """The averages, by the names they have in the network."""
        return {name: average.clone() for name, average in self._averages.items()}

    def state_dict(self) -> dict[str, Any]:
        """Averages and ages; loads with ``weights_only=True``."""
        ages = {name: age.clone() for name, age in self._ages.items()}
        return {"updates": self.updates, "averages": self.values(), "ages": ages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave for a network of the same shapes.

        Raises:
            ValueError: If names or shapes differ.
        """
        for saved, own in ((state["averages"], self._averages), (state["ages"], self._ages)):
            for name in sorted(saved.keys() | own.keys()):
                if name not in saved or name not in own or saved[name].shape != own[name].shape:
                    raise ValueError(f"the saved average is of another network: {name!r} is missing or not alike.")
                own[name].copy_(saved[name])
        self.updates = state["updates"]
