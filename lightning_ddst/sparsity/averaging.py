"""An exponential moving average of a network's weights that respects masks."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_ddst.sparsity.sharding import full_tensor, is_split, reshard, split_like
from lightning_ddst.sparsity.spectral import spectral_norms
from lightning_ddst.sparsity.stored_tensors import weight_norms
from lightning_ddst.sparsity.weight_norm import group_lengths, rescale
from lightning_ddst.utils.states import AGES, COUNT, FLOATS, Form, check_tensors, named
from lightning_ddst.utils.validation import check_choice

BufferHandling = Literal["average", "copy"]


class WeightAverage:
    """A moving average of a network's parameters over training.

    A parameter's average is the plain mean of its values for the first ``1 / (1 - decay)`` updates, and exponential
    from then on. In parameters of two or more dimensions every entry has its own age. An entry that is exactly 0 is
    inactive or has just grown: its average is 0 and restarts with its next value. So inactive weights are 0 in the
    average, and past zeros do not bias the average of grown weights. Under weight norm, where v is averaged like this,
    the average of g is scaled with it.

    Args:
        network: The network; only `swap` changes its parameters.
        decay: Decay of the average, in [0, 1).
        buffers: "average" averages floating-point buffers (BatchNorm's statistics) like parameters; "copy" uses the
            network's current buffers.

    Raises:
        ValueError: For an argument outside the allowed range.
    """

    state_form: ClassVar[Form] = {"updates": COUNT, "averages": named(FLOATS), "ages": named(AGES)}
    """The form of `state_dict`."""

    def __init__(self, network: nn.Module, decay: float = 0.999, buffers: BufferHandling = "average") -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be in [0, 1).")
        check_choice("buffers", buffers, ("average", "copy"))
        self.updates = 0
        self._network = network
        self._decay = decay
        self._spectral = list(spectral_norms(network))
        parameters = dict(network.named_parameters())
        buffers_by_name = dict(network.named_buffers())
        # Spectral norm's vectors are copied: the average of unit vectors is shorter than 1.
        vectors = {id(vector) for spectral in self._spectral for vector in spectral.vectors()}
        self._vectors = {name for name, buffer in buffers_by_name.items() if id(buffer) in vectors}
        averaged = {n for n, b in buffers_by_name.items() if buffers == "average" and b.is_floating_point()}
        names = [*parameters, *(name for name in buffers_by_name if name in averaged | self._vectors)]
        values = parameters | buffers_by_name
        self._averages = {name: values[name].detach().clone() for name in names}
        self._ages = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items() if p.dim() > 1}
        self._swapped = False
        named = {id(parameter): name for name, parameter in parameters.items()}
        norms = [norm for norm in weight_norms(network) if not is_split(norm.v)]  # whose weights have no masks
        self._norms = [(named[id(norm.g)], named[id(norm.v)], norm.dim) for norm in norms]

    def _live(self) -> dict[str, Tensor]:
        # Looked up every time: moving a module replaces its buffers.
        values = dict(self._network.named_parameters()) | dict(self._network.named_buffers())
        return {name: values[name].detach() for name in self._averages}

    @torch.no_grad()
    def update(self) -> None:
        """Adds the network's current values to the averages."""
        decay = min(self._decay, self.updates / (self.updates + 1))
        self.updates += 1
        live = self._live()
        self._rescale_norms(live)
        for name, average in self._averages.items():
            value = live[name]
            if name in self._vectors:
                average.copy_(value)
            elif (age := self._ages.get(name)) is not None:
                self.update_weight(average, value, age, decay)
            else:
                average.lerp_(value, 1 - decay)

    def _rescale_norms(self, live: Mapping[str, Tensor]) -> None:
        """Scales averages of weight norm's g where v was pruned, as `MaskedNetwork` scales g itself."""
        for g, v, dim in self._norms:
            average = self._averages[v]
            pruned = torch.where(live[v] == 0, 0, average)
            lengths = (group_lengths(each, dim).view_as(live[g]) for each in (average, pruned))
            rescale(self._averages[g], *lengths)

    def update_weight(self, average: Tensor, value: Tensor, age: Tensor, decay: float) -> None:
        """Updates the average of a parameter of two or more dimensions; override it for another rule.

        Args:
            average: The current average, changed in place.
            value: The current value, exactly 0 where a weight is inactive.
            age: Number of updates in each entry's average, changed in place.
            decay: The decay of this update for parameters without masks.
        """
        decays = (age / (age + 1)).clamp_(max=self._decay).to(average.dtype)
        average.sub_(value).mul_(decays).add_(value)
        inactive = value == 0
        # Like masked_fill_, which torch 2.8 lacks for sharded tensors.
        average.copy_(torch.where(inactive, 0, average))
        age.add_(1).mul_(~inactive)

    @torch.no_grad()
    def swap(self) -> None:
        """Swaps the network's values and the averages; a second call swaps them back."""
        live = self._live()
        for name, average in self._averages.items():
            kept = live[name].clone()
            live[name].copy_(average)
            average.copy_(kept)
        reshard(self._network)
        self._swapped = not self._swapped
        if self._swapped:
            for spectral in self._spectral:
                spectral.refresh()

    @property
    def swapped(self) -> bool:
        """Whether the network currently holds the averages."""
        return self._swapped

    def values(self) -> dict[str, Tensor]:
        """Returns the averages by their names in the network."""
        averages = self._live() if self._swapped else self._averages
        return {name: full_tensor(average).clone() for name, average in averages.items()}

    def state_dict(self) -> dict[str, Any]:
        """Returns averages and ages; loads with ``weights_only=True``."""
        ages = {name: full_tensor(age).clone() for name, age in self._ages.items()}
        return {"updates": self.updates, "averages": self.values(), "ages": ages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state returned by `state_dict` for a network of the same shapes.

        Raises:
            ValueError: If names or shapes differ.
        """
        pairs = ((state["averages"], self._averages), (state["ages"], self._ages))
        for saved, own in pairs:
            check_tensors("the saved averages", saved, own)
        for saved, own in pairs:
            for name, value in saved.items():
                own[name].copy_(split_like(value.to(own[name].device), own[name]))
        self.updates = state["updates"]


def average_states(states: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns those of several callbacks' states that `WeightAverage.state_dict` returned, by their keys."""
    return {
        key: state
        for key, state in states.items()
        if isinstance(state, Mapping) and state.keys() >= {"updates", "averages", "ages"}
    }
