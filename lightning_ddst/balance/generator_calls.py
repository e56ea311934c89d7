"""Records the generator's calls by hooks, and finds the call that made a tensor."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_ddst.balance.calls import Call, Generated, get_metadata, get_weights_version, walk_graph
from lightning_ddst.balance.replay import CallState
from lightning_ddst.utils.compilation import uncompiled
from lightning_ddst.utils.nested import tensors_in
from lightning_ddst.utils.networks import SeveralParts, get_parts

_CALLS = 16
"""Number of calls of each module to keep: more than lie between a scored batch and the update."""


@dataclass(frozen=True)
class _Running:
    """A call that has not returned yet; the fields are those of `Generated`."""

    network: nn.Module
    call: Call
    state: CallState
    inputs: dict[int | str, Generated] | None


class GeneratorCalls:
    """A recorder of the generator's calls.

    A generator of several parts is not called as a whole. Recorded are the calls of its parts and of the modules that
    hold parts: repeating the innermost call that returned the fakes repeats every part that made them. A call of a part
    whose arguments are other parts' unchanged outputs is repeated after those.

    Args:
        generator: The generator.
        records: Returns whether calls are recorded now.

    Attributes:
        calls: The calls with gradients, oldest first.
        incomplete: Whether images were found that cannot be made again, because something between two parts'
            calls changed what one of them returned, outside any module that was called.
        returns_several: Whether the generator returned several tensors, the first of which are the images.
    """

    def __init__(self, generator: nn.Module, records: Callable[[], bool]) -> None:
        self._generator = generator
        self._several = isinstance(generator, SeveralParts)
        holders = generator.holders if isinstance(generator, SeveralParts) else ()
        self._watched = (*get_parts(generator), *holders)
        self._records = records
        self.clear()

    def attach(self) -> list[RemovableHandle]:
        """Registers hooks on the generator; returns their handles."""
        return [
            handle
            for module in self._watched
            for handle in (
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, with_kwargs=True),
            )
        ]

    def clear(self) -> None:
        """Forgets every call."""
        self.calls: deque[Generated] = deque(maxlen=_CALLS * len(self._watched))
        self.incomplete = self.returns_several = False
        self._running: list[_Running] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "GeneratorCalls":
        """Returns an idle recorder: the hooks of a copied network record nothing."""
        return GeneratorCalls(nn.Identity(), bool)

    @uncompiled
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._records():
            call = Call(args, kwargs)
            inputs = self._find_inputs(call) if self._several else {}
            self._running.append(_Running(module, call.cloned(), CallState.capture(module, args, kwargs), inputs))

    @uncompiled
    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._records():
            return
        while self._running and self._running[-1].network is not module:
            self._running.pop()  # a call that ended with an error
        made = [tensor for _, tensor in tensors_in(output)]
        if not self._running or not made:
            return
        running = self._running.pop()
        self.returns_several |= len(made) > 1
        if not self._several:
            made = made[:1]  # the images; a module that holds parts may return codes before them
        if not any(tensor.grad_fn is not None for tensor in made):
            return
        mark, version = object(), get_weights_version(self._generator)
        for i, tensor in enumerate(made):
            if tensor.grad_fn is not None:
                get_metadata(tensor.grad_fn).setdefault(self, []).append((mark, i, tensor.detach(), tensor._version))
        fake, call = made[0], running.call
        self.calls.append(
            Generated(call, running.state, version, fake.detach(), fake._version, mark, module, running.inputs)
        )

    def find_source(self, value: Tensor) -> Generated | None:
        """Returns the call that made a tensor, found by autograd's graph; None if gradients do not reach one."""
        sources = self._find_nearest(value)
        if not sources and value.grad_fn is not None:  # writing into a view makes other nodes than the marked one
            storage = value.untyped_storage().data_ptr()
            shared = [made for made in reversed(self.calls) if made.fake.untyped_storage().data_ptr() == storage]
            sources = shared if shared and self._reaches_weights(value) else []
        complete = [made for made in sources if made.inputs is not None]
        self.incomplete |= bool(sources) and not complete
        return complete[0] if complete else None

    def _reaches_weights(self, value: Tensor) -> bool:
        """Returns whether gradients flow from a tensor to the generator: a detached copy has the same memory."""
        weights = {id(parameter) for parameter in self._generator.parameters()}
        return any(id(getattr(node, "variable", None)) in weights for node in walk_graph(value))

    def _find_nearest(self, value: Tensor) -> list[Generated]:
        """Returns the calls at the nearest node that has any, the innermost first, each with the tensor made there."""
        known = {id(made.mark): made for made in self.calls}
        for node in walk_graph(value):
            found = [
                known[id(mark)].returned(*tensor)
                for mark, *tensor in get_metadata(node).get(self, [])
                if id(mark) in known
            ]
            if found:
                return found
        return []

    def _find_inputs(self, call: Call) -> dict[int | str, Generated] | None:
        places = {id(value): place for place, value in call.tensors()}
        inputs: dict[int | str, Generated] = {}
        for _, value in tensors_in([call.args, call.kwargs]):
            nearest = self._find_nearest(value)
            unchanged = [made for made in nearest if made.inputs is not None and _is_unchanged(value, made)]
            if nearest and not (unchanged and id(value) in places):
                return None
            if nearest:
                inputs[places[id(value)]] = unchanged[0]
        return inputs


def _is_unchanged(value: Tensor, made: Generated) -> bool:
    same = value.data_ptr() == made.fake.data_ptr() and value.shape == made.fake.shape
    return same and value._version == made.fake_version
