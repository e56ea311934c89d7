"""Reuses the weights that spectral norm computed in one call of a network."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils.hooks import RemovableHandle

from lightning_ddst.sparsity.sharding import is_split
from lightning_ddst.sparsity.spectral import spectral_norms


class NormalizedWeights:
    """The weights that spectral norm (torch's parametrization) computes in one call of a network.

    They depend on the parameters, and on the vectors with which the call begins, but not on its arguments. So other
    calls from the same state can take them, in the same order.

    Args:
        network: The network. Its sharded weights are left out: every process would keep them whole.
    """

    def __init__(self, network: nn.Module) -> None:
        owners = [each.owner for each in spectral_norms(network) if not is_split(each.parameter)]
        self._norms = [owner for owner in owners if isinstance(owner, _SpectralNorm)]
        self._recorded: list[tuple[nn.Module, bool, list[Tensor]]] = []  # norm, whether it was in training, its results
        self._handles: list[RemovableHandle] = []

    def record(self) -> None:
        """Starts recording, before the network's call."""
        for norm in self._norms:
            results: list[Tensor] = []
            self._recorded.append((norm, norm.training, results))
            self._handles.append(norm.register_forward_hook(partial(_keep, results)))

    def stop(self) -> None:
        """Stops recording, after the network's call."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Gives a call inside the context the recorded weights; without any, records those that it computes."""
        if not self._recorded:
            self.record()
            try:
                yield
            finally:
                self.stop()
            return
        norms = [(norm, results) for norm, training, results in self._recorded if norm.training == training]
        try:
            for norm, results in norms:
                norm.forward = _repeating(norm.forward, results)
            yield
        finally:
            for norm, _ in norms:
                vars(norm).pop("forward", None)


def _keep(results: list[Tensor], norm: nn.Module, weight: object, normalized: Tensor) -> None:
    results.append(normalized.detach())


def _repeating(compute: Callable[[Tensor], Tensor], results: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns a function that returns earlier results first, and then computes more of them."""
    given, skipped = iter(results), len(results)

    def forward(weight: Tensor) -> Tensor:
        nonlocal skipped
        if (result := next(given, None)) is not None:
            return result
        for _ in range(skipped):  # each changes the vectors, from which the next begins
            compute(weight)
        skipped = 0
        return compute(weight)

    return forward
