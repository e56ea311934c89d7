"""Generators as computations with one output tensor, and the reasons why torch cannot export them."""

import re
from collections.abc import Sequence
from inspect import Parameter, signature
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.export import ExportedProgram

from lightning_ddst.sparsity.reparametrized import copy_network, fold_weight_norm
from lightning_ddst.utils.cache import first_line
from lightning_ddst.utils.modules import find_raising_module
from lightning_ddst.utils.nested import Place, describe_tensors, get_entry, tensors_in

_UNKNOWN_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'")
_FIXED_SIZE, _BRANCH = "Constraints violated", "data-dependent"


class OneOutput(nn.Module):
    """A network that returns one entry of what another one returns.

    Args:
        network: The other network.
        place: The place of the entry, as in `get_entry`.
    """

    def __init__(self, network: nn.Module, place: Place) -> None:
        super().__init__()
        self.network = network
        self._place = place

    def forward(self, *args: Any) -> Any:
        """Returns the entry."""
        return get_entry(self.network(*args), self._place)


class Computation:
    """A copy of a generator in evaluation mode, on the CPU, with plain weights and one output tensor.

    Args:
        generator: The generator; it does not change.
        inputs: Example arguments; the first dimension of each tensor is the batch.
        output: The place of the output tensor in what the generator returns; None means the only tensor.

    Attributes:
        network: The copy.
        example: The arguments, on the CPU.
        shapes: Their dynamic shapes.
        tensors: Those arguments that are tensors, by name.
        images: The output tensor for the example.

    Raises:
        ValueError: If the generator cannot be called with the inputs, or returns several tensors and `output` is None,
            or no tensor at `output`.
    """

    @torch.no_grad()
    def __init__(self, generator: nn.Module, inputs: Sequence[Any], output: Place | None) -> None:
        self._kind = kind = type(generator).__name__
        self.network: nn.Module = copy_network(generator).cpu().eval()
        fold_weight_norm(self.network)
        self.example = tuple(i.detach().cpu() if isinstance(i, Tensor) else i for i in inputs)
        batch = torch.export.Dim("batch")
        shapes = tuple(({0: batch} if i.dim() else {}) if isinstance(i, Tensor) else None for i in inputs)
        self.shapes: tuple[Any, ...] = shapes
        self.tensors = {
            name: value
            for name, value in zip(self._argument_names(), self.example, strict=True)
            if isinstance(value, Tensor)
        }
        try:
            returned = self.network(*self.example)
        except Exception as error:  # the user's network may raise anything
            raise ValueError(f"{kind} cannot be called with its example inputs: {first_line(error)}") from error
        place = find_output(returned, output, kind)
        if place:  # else the output is the tensor itself
            self.network = OneOutput(self.network, place).eval()
            self.shapes = (shapes,)
        self.images: Tensor = get_entry(returned, place) if place else returned

    def _argument_names(self) -> list[str]:
        parameters = signature(self.network.forward).parameters.values()
        named = [parameter.name for parameter in parameters if parameter.kind is not Parameter.VAR_POSITIONAL]
        more = [f"input_{number}" for number in range(len(named), len(self.example))]
        return (named + more)[: len(self.example)]

    @torch.no_grad()
    def to_program(self) -> ExportedProgram:
        """Returns the network as a program, for any batch size if its code allows that, else with a warning."""
        try:
            return torch.export.export(self.network, self.example, dynamic_shapes=self.shapes, strict=False)
        except Exception as error:  # torch may raise anything for the user's network
            if _FIXED_SIZE not in str(error):
                raise
        program = torch.export.export(self.network, self.example, strict=False)
        self.warn_of_fixed_batch()
        return program

    def warn_of_fixed_batch(self) -> None:
        """Warns that a file works with one batch size only."""
        size = next(len(value) for value in self.tensors.values() if value.dim())
        rank_zero_warn(
            f"the code of {self._kind} depends on the batch size, as grouped convolutions with groups=len(x) do, so "
            f"the file works with batches of {size} only, the size of the example inputs."
        )

    @torch.no_grad()
    def is_random(self) -> bool:
        """Returns whether the network returns other images when it is called again."""
        again: Tensor = self.network(*self.example)
        return not torch.allclose(again.double(), self.images.double(), rtol=0, atol=1e-3, equal_nan=True)

    def why_not(self, error: Exception) -> str:
        """Returns the reason why torch could not export the network, in one line, from the error that it raised."""
        causes = [error]
        while isinstance(cause := causes[-1].__cause__, Exception):
            causes.append(cause)
        if unknown := _UNKNOWN_OPERATOR.search(str(causes[-1])):
            operator = unknown[1].replace("aten.", "")
            return f"ONNX has no operator for torch's {operator}{self._layer_with(unknown[1])}"
        where = self._described(find_raising_module(self.network, causes[-1]))
        if _BRANCH in str(causes[-1]):
            return f"{where}its code depends on the values of a tensor, as in `if x.sum() > 0`"
        return f"{where}{first_line(causes[-1]).removesuffix('.')}"

    def _layer_with(self, operator: str) -> str:
        """Returns a text that names the first layer with an operator; empty if none is found."""
        try:
            nodes = list(self.to_program().run_decompositions().graph.nodes)
        except Exception:  # torch may raise anything for the user's network
            return ""
        modules = dict(self.network.named_modules())
        for node in nodes:
            if str(node.target).startswith(f"{operator}."):
                paths = [path.removeprefix("L['self'].") for path, _ in node.meta.get("nn_module_stack", {}).values()]
                if paths and paths[-1] in modules:
                    return f", which {self._described(modules[paths[-1]]).removesuffix(': ')} uses"
        return ""

    def _described(self, module: nn.Module) -> str:
        names = {id(part): name.removeprefix("network.") for name, part in self.network.named_modules()}
        name = names[id(module)]
        return f"{type(module).__name__} {name!r}: " if name and name != "network" else ""


def find_output(returned: Any, output: Place | None, kind: str) -> str:
    """Returns the place of the output tensor in what a generator returned; empty if that is a tensor itself.

    Args:
        returned: Any nesting of mappings, sequences and dataclasses.
        output: The place that the argument `output` names; None means the only tensor.
        kind: The generator's class, for the error.

    Raises:
        ValueError: If there are several tensors and `output` is None, or no tensor at `output`.
    """
    found = dict(tensors_in(returned))
    if output is None and len(found) == 1:
        return next(iter(found))
    if output is not None:
        try:
            entry = get_entry(returned, output)
        except KeyError:
            entry = None
        if isinstance(entry, Tensor):
            return str(output)
        raise ValueError(
            f"output={output!r} is no tensor that {kind} returns; it returns {describe_tensors(returned)}."
        )
    example = f", such as output={next(iter(found))!r}" if found else ""
    raise ValueError(
        f"output=None: {kind} returns {len(found)} tensors, and one is written; name it{example}. "
        f"It returns {describe_tensors(returned)}."
    )
