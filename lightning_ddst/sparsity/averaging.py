"""An exponential moving average of a network's weights that respects masks."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_ddst.sparsity.launches import zero_where_inactive
from lightning_ddst.sparsity.sharding import full_tensor, is_split, local_part, reshard, split_like
from lightning_ddst.sparsity.spectral import spectral_norms
from lightning_ddst.sparsity.stored_tensors import weight_norms
from lightning_ddst.sparsity.weight_norm import group_lengths, rescale
from lightning_ddst.utils.states import AGES, COUNT, FLOATS, Form, check_tensors, named
from lightning_ddst.utils.together import clone_together, copy_together, is_plain, lerp_together
from lightning_ddst.utils.validation import check_choice

BufferHandling = Literal["average", "copy"]
_MOST_ON_CPU, _MOST = 2**16, 2**24
"""Number of entries that are averaged together at most: on a CPU, intermediate results stay in its cache."""


@dataclass(frozen=True)
class _Group:
    """Parameters of one dtype on one device whose averages are one tensor, so that all take one kernel per operation.

    Attributes:
        places: Shape, strides and first entry of each parameter in the tensor, by name.
        averages: The averages, ``(entries,)``.
        ages: Number of updates in each of them, float32 of the same shape.
    """

    places: Mapping[str, tuple[torch.Size, tuple[int, ...], int]]
    averages: Tensor
    ages: Tensor

    @classmethod
    def of_parameters(cls, parameters: Mapping[str, Tensor]) -> "_Group":
        """Makes the group of parameters, with their current values and ages of 0."""
        places, start = {}, 0
        for name, parameter in parameters.items():
            places[name] = (parameter.shape, torch.empty_like(parameter, device="meta").stride(), start)
            start += parameter.numel()
        averages = next(iter(parameters.values())).new_empty(start)
        group = cls(places, averages, torch.zeros_like(averages, dtype=torch.float32))
        group.averages.copy_(group.join(parameters))
        return group

    def split(self, joined: Tensor) -> dict[str, Tensor]:
        """Returns the parts of a tensor of shape ``(entries,)`` by name, each of its parameter's shape."""
        return {name: joined.as_strided(*place) for name, place in self.places.items()}

    def join(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns the values of the parameters as one tensor of shape ``(entries,)``."""
        values = [parameters[name] for name in self.places]
        if len(values) == 1 and values[0].is_contiguous():
            return values[0].view(-1)
        joined = torch.empty_like(self.averages)
        copy_together(self.split(joined).values(), values)
        return joined


def _choose_most(tensor: Tensor) -> int:
    """Returns how many entries on the device of a tensor are averaged together at most."""
    return _MOST_ON_CPU if tensor.device.type == "cpu" else _MOST


def _make_groups(parameters: Mapping[str, Tensor]) -> Iterator[_Group]:
    """Groups parameters by dtype and device, and each kind into groups of limited size."""
    kinds: dict[object, list[dict[str, Tensor]]] = {}
    for name, parameter in parameters.items():
        groups = kinds.setdefault((parameter.dtype, parameter.device), [{}])
        if sum(each.numel() for each in groups[-1].values()) + parameter.numel() > _choose_most(parameter):
            groups.append({})
        groups[-1][name] = parameter
    return (_Group.of_parameters(group) for groups in kinds.values() for group in groups if group)


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
        weights = {name: p.detach() for name, p in parameters.items() if p.dim() > 1}
        self._groups = list(_make_groups({name: weight for name, weight in weights.items() if is_plain(weight)}))
        self._ages_alone = {n: torch.zeros_like(w, dtype=torch.float32) for n, w in weights.items() if not is_plain(w)}
        grouped = {name for group in self._groups for name in group.places}
        self._averages_alone = {name: values[name].detach().clone() for name in names if name not in grouped}
        self._names = names
        self._swapped = False
        named = {id(parameter): name for name, parameter in parameters.items()}
        norms = [norm for norm in weight_norms(network) if not is_split(norm.v)]  # whose weights have no masks
        self._norms = [(named[id(norm.g)], named[id(norm.v)], norm.dim) for norm in norms]

    @property
    def _averages(self) -> dict[str, Tensor]:
        averages = self._averages_alone.copy()
        for group in self._groups:
            averages |= group.split(group.averages)
        return {name: averages[name] for name in self._names}

    @property
    def _ages(self) -> dict[str, Tensor]:
        ages = self._ages_alone.copy()
        for group in self._groups:
            ages |= group.split(group.ages)
        return {name: ages[name] for name in self._names if name in ages}

    def _live(self) -> dict[str, Tensor]:
        # Looked up every time: moving a module replaces its buffers.
        values = dict(self._network.named_parameters()) | dict(self._network.named_buffers())
        return {name: values[name].detach() for name in self._names}

    @torch.no_grad()
    def update(self) -> None:
        """Adds the network's current values to the averages."""
        decay = min(self._decay, self.updates / (self.updates + 1))
        self.updates += 1
        live = self._live()
        self._rescale_norms(live)
        for group in self._groups:
            parts = (each.split(_choose_most(each)) for each in (group.averages, group.join(live), group.ages))
            for average, value, age in zip(*parts, strict=True):
                self.update_weight(average, value, age, decay)
        for name, average in self._averages_alone.items():
            if (age := self._ages_alone.get(name)) is not None:
                self.update_weight(local_part(average), local_part(live[name]), local_part(age), decay)
        copied = {name: average for name, average in self._averages_alone.items() if name in self._vectors}
        copy_together(copied.values(), (live[name] for name in copied))
        rest = {n: a for n, a in self._averages_alone.items() if n not in copied and n not in self._ages_alone}
        lerp_together(rest.values(), (live[name] for name in rest), 1 - decay)

    def _rescale_norms(self, live: Mapping[str, Tensor]) -> None:
        """Scales averages of weight norm's g where v was pruned, as `MaskedNetwork` scales g itself."""
        averages = self._averages if self._norms else {}
        for g, v, dim in self._norms:
            average = averages[v]
            pruned = torch.where(live[v] == 0, 0, average)
            lengths = (group_lengths(each, dim).view_as(live[g]) for each in (average, pruned))
            rescale(averages[g], *lengths)

    def update_weight(self, average: Tensor, value: Tensor, age: Tensor, decay: float) -> None:
        """Updates averages of parameters of two or more dimensions; override it for another rule.

        It must treat every entry alone, because entries of several parameters come in one tensor.

        Args:
            average: The current averages, changed in place.
            value: The current values, exactly 0 where a weight is inactive.
            age: Number of updates in each entry's average, changed in place.
            decay: The decay of this update for parameters without masks.
        """
        decays = (age / (age + 1)).clamp_(max=self._decay).to(average.dtype)
        average.sub_(value).mul_(decays).add_(value)
        active = value.bool()
        zero_where_inactive([average], [active])
        zero_where_inactive([age.add_(1)], [active])

    @torch.no_grad()
    def swap(self) -> None:
        """Swaps the network's values and the averages; a second call swaps them back."""
        live, averages = [*self._live().values()], [*self._averages.values()]
        kept = clone_together(live)
        copy_together(live, averages)
        copy_together(averages, kept)
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
