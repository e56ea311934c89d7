"""Counts how often weights are used, from the matrix products and convolutions that torch computes."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import flop_registry

from lightning_ddst.sparsity.observed_ops import observed
from lightning_ddst.sparsity.sharding import is_split

_aten = torch.ops.aten
_FUSED = {
    *("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn"),
    *("_transformer_encoder_layer_fwd", "_native_multi_head_attention"),
}
"""Operations that use each of their weights once per row of their first argument."""
_FUSED_BACKWARD = {"mkldnn_rnn_layer_backward", "_cudnn_rnn_backward", "miopen_rnn_backward"}
_VECTOR_PRODUCTS = {"mv", "addmv", "dot", "vdot"}
"""Products of spectral norm, which `FlopCounterMode` does not count; a result does not stand for the weight."""
_OTHERS = ("_foreach", "_fused", "new_")
"""Beginnings of the names of optimizers' operations and of those that use shapes only."""
_PARTS = {"index_select", "index"}
"""Operations that copy a part of a tensor."""
_PRODUCT_NODES = ("mmbackward", "mvbackward", "convolution", "rnn", "attention")
"""Parts of the names of autograd's nodes that differentiate products."""


@dataclass(frozen=True)
class _Source:
    """The weights that a tensor stands for.

    Attributes:
        entries: The number of entries of each weight, by name.
        mixed: Whether other tensors than scalars took part, as in modulation.
    """

    entries: Mapping[str, int]
    mixed: bool = False


@dataclass(frozen=True)
class _Product:
    """A product with a weight in a forward pass, which autograd may differentiate.

    Attributes:
        source: The weight.
        shape: The sorted shape of the operand that stands for it.
        others: The numbers of entries of the other operands.
        groups: The number of groups of a convolution; some gradients of the weight are computed group by group.
    """

    source: _Source
    shape: Sequence[int]
    others: Sequence[int]
    groups: int

    def has_gradient(self, operands: Sequence[Tensor], result: Any) -> bool:
        """Returns whether a product in a backward pass is the gradient of the weight, not of another operand."""
        same = isinstance(result, Tensor) and (len(self.shape) > 3 or sorted(result.shape) == self.shape)
        return same and any(each.numel() * parts in self.others for each in operands for parts in {1, self.groups})


class OpCounter:
    """A counter of how often each weight is used, by whatever function or module.

    This number times the number of active weights times 2 (a multiplication and an addition) is the number of
    floating-point operations, for any density. The counter observes torch's operations, and counts each matrix product
    and convolution, by the formulas of `torch.utils.flop_counter`, for the weights that an operand stands for: the
    parameter, its views, and tensors that other operations computed from it without reducing it (casts, scaling,
    normalization, modulation). In backward passes, also second ones, it counts the gradients of inputs and of weights.
    It does not count biases, norms, activations and products of activations.

    Args:
        parameters: The weights by name.
        kept: Weights that may be used in part, as in `StructuredForward`: their uses count per entry of that part.
        current: Function that returns the parameters that the networks hold at the moment; needed for sharded ones.

    Attributes:
        uses: Multiplications per weight by name, forward and backward.
        gradient_uses: The part of `uses` that computed the weight's gradient.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        kept: Callable[[str], bool] = lambda name: False,
        current: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.uses: dict[str, Fraction] = defaultdict(Fraction)
        self.gradient_uses: dict[str, Fraction] = defaultdict(Fraction)
        self._paused = False
        self._parameters = dict(parameters)
        self._kept = kept
        self._current = current if any(is_split(each) for each in self._parameters.values()) else None
        self._clear()

    def _clear(self) -> None:
        self._own: dict[int, list[tuple[int, int, str]]] = {}  # first and last entry of each weight, by storage
        # A weak reference keeps a freed storage's address from being used again.
        self._derived: dict[int, tuple[StorageWeakRef, _Source]] = {}
        self._products: dict[int, _Product | None] = {}  # by the number of autograd's node
        self._first = torch._C._autograd._get_sequence_nr()  # nodes with smaller numbers were not seen

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts the operations inside the context."""
        self._clear()
        self._register(self._parameters)
        try:
            with observed(self.observe):
                yield
        finally:
            self._clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Counts nothing inside the context."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _register(self, parameters: Mapping[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            if not is_split(parameter):
                first = int(parameter.storage_offset())
                ranges = self._own.setdefault(parameter.untyped_storage()._cdata, [])
                ranges.append((first, first + parameter.numel(), name))

    # ---- operations --------------------------------------------------------------------------------

    def observe(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Counts one of torch's operations, which has just been computed."""
        kind, name = func._overloadpacket, func._overloadpacket.__name__
        if self._current is not None and any(self._is_new(each) for each in _tensors(args)):
            self._register(self._current())
        if kind in flop_registry:
            self._observe_product(kind, args, kwargs, result)
        elif name in _FUSED or name in _FUSED_BACKWARD:
            self._observe_fused(name, args)
        elif name not in _VECTOR_PRODUCTS and not name.startswith(_OTHERS) and not name.endswith("_like"):
            self._derive(func, name, args, result)

    def _observe_product(self, kind: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        weights, inputs, groups = 1, 0, 1
        if kind is _aten.convolution_backward:
            # Each gradient takes as many operations as the forward pass; torch's formula counts grouped ones more.
            gradient, image, weight, _, *settings = args[:8]
            forward = flop_registry[_aten.convolution](image, weight, None, *settings, out_val=gradient)
            groups, (inputs, weights, *_) = args[9:11]
            operands = [image, weight]
        else:
            forward = flop_registry[kind](*args, **kwargs, out_val=result)
            groups = args[8] if kind is _aten.convolution else 1
            first = int(kind in (_aten.addmm, _aten.baddbmm))
            operands = [each for each in args[first : first + 2] if isinstance(each, Tensor)]
        source, operand = self._pick(operands, last="conv" in kind.__name__)
        node = torch._C._current_autograd_node()
        if kind is _aten.convolution_backward:
            source = source or self._find_differentiated(node, operands, result[1])
            self._add(source, forward * (inputs + weights), forward * weights)
        elif source is not None:
            self._add(source, forward)
        elif node is not None:
            source = self._find_differentiated(node, operands, result)
            self._add(source, forward, forward)
        self._remember(source, operand, args, groups)

    def _add(self, source: _Source | None, flops: int, gradient: int = 0) -> None:
        if source is not None and not self._paused:
            entries = 2 * sum(source.entries.values())
            for name in source.entries:
                self.uses[name] += Fraction(flops, entries)
                self.gradient_uses[name] += Fraction(gradient, entries)

    def _observe_fused(self, name: str, args: Sequence[Any]) -> None:
        rows = args[0].numel() // args[0].shape[-1]
        sources = [source for each in _tensors(args) if (source := self._find(each)) is not None]
        # cuDNN computes weights' gradients where it is asked to, oneDNN always.
        trains = name in _FUSED_BACKWARD and (name.startswith("mkldnn") or args[-1][3])
        if not self._paused:
            for used in {used for source in sources for used in source.entries}:
                self.uses[used] += rows * (1 + trains)
                self.gradient_uses[used] += rows * trains

    def _derive(self, func: Any, name: str, args: Sequence[Any], result: Any) -> None:
        inputs = list(_tensors(args))
        found = [(each, source) for each in inputs if (source := self._find(each)) is not None]
        if not found or (func._schema.is_mutable and not torch.is_grad_enabled()):
            return  # such writes are those of optimizers, averages and buffers
        mixed = any(source.mixed for _, source in found) or any(
            each.dim() and each.is_floating_point() for each in inputs if self._find(each) is None
        )
        entries = {used: number for _, source in found for used, number in source.entries.items()}
        largest = max(each.numel() for each, _ in found)
        for made in _tensors(result):
            if name in _PARTS and all(map(self._kept, entries)):
                entries = {used: number * made.numel() // largest for used, number in entries.items()}
            # A sum or a norm does not stand for the weight.
            elif made.numel() < largest and name not in _PARTS:
                continue
            if made.is_floating_point() and self._find(made) is None:
                storage = made.untyped_storage()
                self._derived[storage._cdata] = StorageWeakRef(storage), _Source(entries, mixed)

    # ---- weights -----------------------------------------------------------------------------------

    def _is_new(self, tensor: Tensor) -> bool:
        return isinstance(tensor, nn.Parameter) and not is_split(tensor) and self._find(tensor) is None

    def _find(self, tensor: Tensor) -> _Source | None:
        """Returns the weights that a tensor stands for."""
        if tensor.layout is not torch.strided or is_split(tensor):
            return None
        storage = tensor.untyped_storage()._cdata
        if storage in self._derived:
            return self._derived[storage][1]
        place = tensor.storage_offset()
        for first, end, name in self._own.get(storage, ()):
            if first <= place < end:
                return _Source({name: self._parameters[name].numel()})
        node = _get_node(tensor)
        if self._is_early(node) and (source := self._find_behind(node, forks=False)) is not None:
            # A cast that autocast kept, or another tensor from before counting began.
            self._derived[storage] = StorageWeakRef(tensor.untyped_storage()), source
            return source
        return None

    def _pick(self, operands: Sequence[Tensor], *, last: bool) -> tuple[_Source | None, Tensor | None]:
        """Returns the weights of a product, and their operand: the less mixed one, else the last."""
        found = [(source, each) for each in operands if (source := self._find(each)) is not None]
        if not found:
            return None, None
        return found[-1] if last else min(reversed(found), key=lambda each: each[0].mixed)

    # ---- autograd's graph --------------------------------------------------------------------------

    def _remember(self, source: _Source | None, operand: Tensor | None, args: Sequence[Any], groups: int) -> None:
        tensors = list(_tensors(args[:3]))
        if not any(each.requires_grad for each in tensors):
            return
        product = None
        if source is not None and operand is not None:
            others = [each.numel() for each in tensors if each is not operand]
            product = _Product(source, sorted(operand.shape), others, groups)
        node = torch._C._autograd._get_sequence_nr() - 1
        if torch.is_grad_enabled():
            self._products[node] = product
        else:  # inside of a custom autograd function
            self._products.setdefault(node, product)

    def _find_differentiated(self, node: Node | None, operands: Sequence[Tensor], result: Any) -> _Source | None:
        """Returns the weights whose gradient a backward pass computes, as products without an operand of theirs."""
        if node is None:
            return None
        if self._is_early(node):
            return self._find_behind(node)
        product = self._products.get(node._sequence_nr())
        return product.source if product is not None and product.has_gradient(operands, result) else None

    def _is_early(self, node: Node | None) -> bool:
        return node is not None and node._sequence_nr() < self._first

    def _find_behind(self, node: Node | None, *, forks: bool = True) -> _Source | None:
        """Returns the weights that autograd's graph reaches from a node without another product, nearest first."""
        waiting, seen = deque([node]), set()
        while waiting:
            behind = [each for each, _ in waiting.popleft().next_functions if each is not None]  # type: ignore[union-attr]
            if len(behind) > 1 and not forks:
                return None
            for each in behind:
                variable = getattr(each, "variable", None)
                if variable is not None and (source := self._find(variable)) is not None:
                    return source
                if each not in seen and not any(part in each.name().lower() for part in _PRODUCT_NODES):
                    seen.add(each)
                    waiting.append(each)
        return None


def _get_node(tensor: Tensor) -> Node | None:
    try:
        return tensor.grad_fn
    except RuntimeError:  # a view that was made without gradients, and whose base was written to since
        return None


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values if isinstance(values, list | tuple) else (values,):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
