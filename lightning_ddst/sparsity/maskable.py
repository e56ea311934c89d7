"""The maskable weights of a network, and the parameters that store them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_ddst.sparsity.layer_patterns import first_match, name_of_layer
from lightning_ddst.sparsity.sharding import full_tensor, is_split
from lightning_ddst.sparsity.spectral import SpectralVectors, spectral_norms
from lightning_ddst.sparsity.stored_tensors import StoredTensor, modules_with_tensors, stored_tensors, weight_norms
from lightning_ddst.sparsity.weight_norm import WeightNorm

TRANSPOSED_LAYERS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Layers whose weight has input channels as first dimension."""

MASKABLE_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED_LAYERS)
"""Layers whose ``weight`` is masked; biases, norms, embeddings and learned constants are never masked."""

_OF_SEVERAL = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
"""Modules of torch with several weights, all with "weight" in their names and of shape (outputs, inputs)."""
_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Classes of torch that a user's own modules derive from."""
_NO_WEIGHTS = ("embed", "posit", "codebook", "quantiz", "const")
"""Parts of names of parameters and classes of a user's own that are no weights of layers."""

Dims = tuple[int, int]
"""The dimensions of outputs and of inputs of a weight."""
MaskedParameters = Mapping[str, Sequence[int]]
"""Dimensions of outputs and of inputs by the pattern of a parameter's name; negative ones count from the end."""


def channel_dim(layer: nn.Module) -> int:
    """Returns the dimension of channels in a maskable layer's input and output, counted from the end."""
    return -1 - len(layer.kernel_size) if hasattr(layer, "kernel_size") else -1  # type: ignore[arg-type]


@dataclass(frozen=True)
class MaskableWeight:
    """One weight that can be masked.

    Attributes:
        name: Its name as in ``network.named_parameters()``.
        parameter: The parameter that an optimizer updates, and that a mask sets to 0. Under spectral norm this is the
            weight before normalization, under weight norm v.
        layers: The modules that hold it, by name; several if it is shared.
        spectral: The singular vectors that spectral norm keeps for it, one pair per layer.
        tensor: Its name in the first of these modules, such as ``"weight"``.
        out_dim: The dimension of outputs.
        in_dim: The dimension of inputs.
        norm: Its weight norm; None without.
    """

    name: str
    parameter: nn.Parameter
    layers: dict[str, nn.Module]
    spectral: tuple[SpectralVectors, ...]
    tensor: str
    out_dim: int
    in_dim: int
    norm: WeightNorm | None

    @property
    def is_of_layer(self) -> bool:
        """Whether it is the ``weight`` of Linear, Conv or ConvTranspose layers, without weight norm."""
        return self.norm is None and self.tensor == "weight" and _are_layers(self.layers)

    @property
    def places(self) -> dict[str, nn.Module]:
        """Its layers, by the names that patterns may match; outside Linear and Conv layers also by its own name."""
        return _places(self.layers, self.tensor)

    @property
    def fans(self) -> tuple[int, ...]:
        """The numbers of outputs and of inputs, then the sizes of other dimensions without leading ones."""
        shape, used = self.parameter.shape, (self.out_dim, self.in_dim)
        others = [n for dim, n in enumerate(shape) if dim not in used and (n > 1 or dim > min(used))]
        return (shape[self.out_dim], shape[self.in_dim], *others)

    @property
    def least(self) -> int:
        """The number of active entries that must stay: one for every norm of weight norm, else 0."""
        return 0 if self.norm is None else self.norm.groups

    def effective(self) -> Tensor:
        """Returns the full weight by which entries are compared: under weight norm ``g v / |v|``."""
        return full_tensor(self.parameter.detach()) if self.norm is None else self.norm.effective()


def maskable_weights(
    network: nn.Module,
    masked_parameters: MaskedParameters | None = None,
    *,
    dense_layers: Sequence[str] = (),
    name: str = "",
) -> list[MaskableWeight]:
    """Lists the weights of a network that can be masked.

    They are

    - the weights of Linear, Conv and ConvTranspose layers, of recurrent layers and cells, and of MultiheadAttention;
    - in a user's own modules, parameters with "weight" in their name and at least two dimensions larger than 1. Their
      shape is (outputs, inputs, ...), or (1, outputs, inputs, ...) if there are five dimensions. Left out are those
      with "embed", "posit", "codebook", "quantiz" or "const" in their name or in the name of their module's class;
    - the parameters that `masked_parameters` declares.

    A shared weight is listed once. A weight that another kind of module shares (an embedding, for example) is left out.

    Args:
        network: Any module.
        masked_parameters: The dimensions of outputs and of inputs of further parameters, by patterns of their names
            (``{"*.conv.kernel": (0, 1)}``). The first match counts; parameters are named as their module names them,
            also if a norm computes them.
        dense_layers: Patterns of layers that stay dense: these may be lazy, or computed in any way.
        name: The network's name, which precedes names when patterns are compared.

    Returns:
        The weights, also those of `dense_layers`, in the order of ``network.named_parameters()``.

    Raises:
        ValueError: If a layer is lazy and has no shape yet, if a parametrization other than spectral norm and weight
            norm computes its weight, if `masked_parameters` does not fit, or if the network has no maskable weight.
    """
    declared = masked_parameters or {}
    if missing := declared.keys() - matched_parameters(declared, network, name).keys():
        raise ValueError(f"masked_parameters: {min(missing)!r} matches no parameter of {type(network).__name__}.")
    found, problems = _find(network, declared, name)
    for use, problem in problems:
        if first_match(dense_layers, {use.layer_name: use.layer}, name) is None:
            raise ValueError(problem)
    if not found:
        kinds = ", ".join(kind.__name__ for kind in MASKABLE_LAYERS)
        raise ValueError(
            f"{type(network).__name__} has nothing to mask: it has no weight in a {kinds}, recurrent or attention "
            'layer, or in a layer of its own; name parameters in masked_parameters={"*.kernel": (out_dim, in_dim)}.'
        )
    return found


def layer_weights(network: nn.Module) -> list[MaskableWeight]:
    """Lists the maskable weights of Linear, Conv and ConvTranspose layers without weight norm; none is rejected."""
    return [weight for weight in _find(network, {}, "")[0] if weight.is_of_layer]


def all_weights(network: nn.Module) -> Iterator[tuple[str, nn.Parameter, dict[str, nn.Module]]]:
    """Yields every parameter of two or more dimensions, maskable or not, except the norms g of weight norm.

    Yields:
        The parameter's name, the parameter, and its layer by the names that patterns may match.
    """
    norms = {id(norm.g) for norm in weight_norms(network)}
    for name, parameter in network.named_parameters():
        if is_lazy(parameter) or parameter.dim() < 2 or id(parameter) in norms:
            continue
        layer_name, _, tensor = name.rpartition(".")
        if ".parametrizations." in f".{name}":
            layer_name, _, tensor = f".{layer_name}".rpartition(".parametrizations.")
        layer_name = layer_name.removeprefix(".")
        yield name, parameter, _places({layer_name: network.get_submodule(layer_name)}, tensor)


def _are_layers(layers: Mapping[str, nn.Module]) -> bool:
    return all(isinstance(layer, MASKABLE_LAYERS) for layer in layers.values())


def _places(layers: dict[str, nn.Module], tensor: str) -> dict[str, nn.Module]:
    own = {} if _are_layers(layers) else {name_of_layer(name, tensor): layer for name, layer in layers.items()}
    return layers | own


def matched_parameters(masked_parameters: MaskedParameters, network: nn.Module, name: str) -> MaskedParameters:
    """Returns the part of `masked_parameters` whose patterns match a parameter of the network of this name."""
    matched = {pattern for use in _uses(network, masked_parameters, name) for pattern in use.patterns}
    return {pattern: dims for pattern, dims in masked_parameters.items() if pattern in matched}


@dataclass(frozen=True)
class _Use:
    """A tensor of one module, with the patterns of `masked_parameters` that match its name."""

    layer_name: str
    layer: nn.Module
    tensor: str
    stored: StoredTensor
    patterns: tuple[str, ...]


def _uses(network: nn.Module, masked_parameters: MaskedParameters, name: str) -> Iterator[_Use]:
    for layer_name, layer in modules_with_tensors(network):
        tensors = stored_tensors(layer)
        patterns = {}
        for tensor in tensors:
            full_name = name_of_layer(name, name_of_layer(layer_name, tensor))
            patterns[tensor] = tuple(pattern for pattern in masked_parameters if fnmatchcase(full_name, pattern))
        if isinstance(layer, MASKABLE_LAYERS) and not any(patterns.values()):
            tensors.setdefault("weight", StoredTensor(None))
        for tensor, stored in tensors.items():
            yield _Use(layer_name, layer, tensor, stored, patterns.get(tensor, ()))


def _find(
    network: nn.Module, masked_parameters: MaskedParameters, name: str
) -> tuple[list[MaskableWeight], list[tuple[_Use, str]]]:
    """Returns the maskable weights, and the weights that cannot be masked, each with the reason."""
    uses: dict[int, list[tuple[_Use, Dims]]] = {}
    problems: list[tuple[_Use, str]] = []
    elsewhere: set[int] = set()
    for use in _uses(network, masked_parameters, name):
        dims, key = _dims(use, masked_parameters), id(use.stored.parameter)
        if dims is None:
            elsewhere.add(key)
        elif (problem := _problem(use, [other for other, _ in uses.get(key, [])])) is not None:
            problems.append((use, problem))
            elsewhere.add(key)
        else:
            uses.setdefault(key, []).append((use, dims))
    spectral = list(spectral_norms(network))
    found = []
    for parameter_name, parameter in network.named_parameters():
        here = uses.get(id(parameter), [])
        shared = id(parameter) in elsewhere and not any(use.patterns for use, _ in here)
        if here and not shared and parameter.numel():
            first, (out_dim, in_dim) = here[0]
            layers = {use.layer_name: use.layer for use, _ in here}
            vectors = tuple(each for each in spectral if each.parameter is parameter)
            stored = (first.tensor, out_dim, in_dim, first.stored.norm)
            found.append(MaskableWeight(parameter_name, parameter, layers, vectors, *stored))
    return found, problems


def _dims(use: _Use, masked_parameters: MaskedParameters) -> Dims | None:
    """Returns the dimensions of a tensor that is a weight; None for others."""
    of_torch = _dims_in_torch(use)
    if use.patterns:
        pattern = use.patterns[0]
        return _declared_dims(use, pattern, masked_parameters[pattern], masked=of_torch is not None)
    return of_torch or _dims_in_own(use)


def _dims_in_torch(use: _Use) -> Dims | None:
    """Returns the dimensions of a weight of torch's layers."""
    if isinstance(use.layer, MASKABLE_LAYERS):
        return ((1, 0) if isinstance(use.layer, TRANSPOSED_LAYERS) else (0, 1)) if use.tensor == "weight" else None
    parameter = use.stored.parameter
    is_weight = isinstance(use.layer, _OF_SEVERAL) and "weight" in use.tensor
    return (0, 1) if is_weight and parameter is not None and parameter.dim() == 2 else None


def _dims_in_own(use: _Use) -> Dims | None:
    """Returns the dimensions of a tensor that is a weight by its name and shape in a user's own module."""
    parameter, kind = use.stored.parameter, type(use.layer)
    base = next(each for each in kind.__mro__ if each.__module__.startswith("torch.nn.modules."))
    names = f"{kind.__name__} {use.tensor}".lower()
    if parameter is None or base not in _CONTAINERS or "weight" not in use.tensor.lower():
        return None
    if any(part in names for part in _NO_WEIGHTS):
        return None
    if is_lazy(parameter):
        return 0, 1
    if sum(size > 1 for size in parameter.shape) < 2:
        return None
    return (1, 2) if parameter.dim() == 5 and len(parameter) == 1 else (0, 1)


def _declared_dims(use: _Use, pattern: str, dims: Sequence[int], *, masked: bool) -> Dims:
    """Checks the dimensions that `masked_parameters` gives for a tensor, and returns them as positive numbers."""
    place = f"masked_parameters[{pattern!r}]={dims!r} matches {name_of_layer(use.layer_name, use.tensor)!r}, which"
    if masked:
        raise ValueError(f"{place} is masked without it.")
    if use.stored.parameter is None:
        raise ValueError(f"{place} is computed from other parameters.")
    shape = tuple(use.stored.parameter.shape)
    count = len(shape)
    if (
        not isinstance(dims, Sequence)
        or len(dims) != 2
        or not all(isinstance(dim, int) and -count <= dim < count for dim in dims)
    ):
        raise ValueError(f"{place} has the shape {shape}; give two of its dimensions, (out_dim, in_dim).")
    out_dim, in_dim = (dim % count for dim in dims)
    if out_dim == in_dim:
        raise ValueError(f"{place} has the shape {shape}; its out_dim and in_dim must differ.")
    return out_dim, in_dim


def _problem(use: _Use, others: Sequence[_Use]) -> str | None:
    """Returns the reason why a weight cannot be masked, given its uses in other modules; None if it can."""
    stored = use.stored
    if stored.parameter is None:
        return (
            f"The weight of layer {use.layer_name!r} is computed from other parameters in a way that cannot be masked. "
            "Allowed are plain weights, spectral norm and weight norm of torch; remove torch.nn.utils.prune and other "
            "parametrizations, or name the layer in dense_layers."
        )
    if is_lazy(stored.parameter):
        return f"Layer {use.layer_name!r} is lazy and has no shape yet: run the network once before masking."
    if stored.norm is not None and is_split(stored.norm.v):
        return (
            f"Layer {use.layer_name!r} has weight norm and is sharded over processes (FSDP2), which cannot be masked: "
            "use DDP, or name the layer in dense_layers."
        )
    for other in others:
        there = other.stored.norm
        if not (there is stored.norm is None or (stored.norm is not None and stored.norm.is_same(there))):
            return (
                f"The weight of layer {use.layer_name!r} is also that of layer {other.layer_name!r}, under another "
                "weight norm, so it cannot be masked: name the layers in dense_layers."
            )
    return None
