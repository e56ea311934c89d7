"""Other implementations of mask updates, read from clones of their repositories.

    git clone https://github.com/YiteWang/ADAPT authors            # the paper's
    git clone https://github.com/nollied/rigl-torch rigl-torch
    git clone https://github.com/mklasby/sparsimony sparsimony

Nothing of theirs is changed but what they would not run without: `.cuda()` stays on the CPU, and modules that they
import and do not use here (image readers, DeepSpeed) are empty.
"""

import argparse
import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_ddst.gan.module import paper_adam
from lightning_ddst.sparsity import maskable_weights

PEERS = ("authors", "rigl-torch", "sparsimony")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders of the clones; peers without one are left out."""
    for name in PEERS:
        parser.add_argument(f"--{name}", type=Path, metavar="CLONE", help=f"a clone of {name}'s repository")


@contextmanager
def quiet() -> Iterator[None]:
    """The authors' code prints a lot."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def package(clone: Path, name: str) -> None:
    """Makes a package of a clone importable without what its `__init__` imports."""
    if name in sys.modules:
        return
    module = ModuleType(name)
    module.__path__ = [str(clone / name)]
    sys.modules[name] = module


def authors(clone: Path) -> ModuleType:
    """The paper's code; `Masking` is the class."""
    package(clone, "sparselearning")
    functions = ModuleType("sparselearning.gan_functions")
    functions.copy_params = functions.copy_zero_params = None  # type: ignore[attr-defined]
    sys.modules.setdefault(functions.__name__, functions)
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    return importlib.import_module("sparselearning.core")


def authors_masking(clone: Path, network: nn.Module, optimizer: Optimizer, density: float, every: int) -> Any:
    """The paper's masking of a network: RigL's exploration with global pruning and growth."""
    core = authors(clone)
    with quiet():
        masking = core.Masking(
            optimizer,
            death_rate=0.5,
            death_rate_decay=core.CosineDecay(0.5, 100_000),
            death_mode="global_magnitude",
            growth_mode="global_gradient",
            redistribution_mode="none",
            fix=False,
            update_frequency=every,
        )
        masking.add_module(network, density=density, sparse_init="ERK")
    return masking


class Masked(NamedTuple):
    """A network that a peer has masked.

    Attributes:
        step: Makes a step of the optimizer after a backward pass; inactive weights stay 0.
        explore: Prunes half of the active weights and grows as many, by the gradients of all maskable weights by name.
    """

    step: Callable[[], object]
    explore: Callable[[dict[str, torch.Tensor]], object]


def attach(clone: Path, peer: str, network: nn.Module, density: float, every: int = 1) -> Masked:
    """Has a peer mask a network.

    Args:
        clone: Of the peer's repository.
        peer: One of `PEERS`.
        network: The network, which only sparsimony cannot mask where it has spectral norm.
        density: Its density.
        every: Steps between the peer's own mask updates, as far as it prepares for them in other steps.
    """
    weights = {weight.name: weight.parameter for weight in maskable_weights(network)}
    optimizer = paper_adam(network.parameters())

    if peer == "authors":
        masking = authors_masking(clone, network, optimizer, density, every)

        def step() -> None:
            optimizer.step()
            masking.apply_mask()

        def explore(gradients: dict[str, torch.Tensor]) -> None:
            for name, gradient in gradients.items():
                weights[name].grad = gradient
            with quiet():
                masking.truncate_weights()

        return Masked(step, explore)

    if peer == "rigl-torch":
        package(clone, "rigl_torch")
        from rigl_torch.RigL import RigLScheduler

        scheduler = RigLScheduler(
            network, optimizer, density, T_end=10**9, alpha=0.5, ignore_linear_layers=False, delta=max(every, 2)
        )

        def explore(gradients: dict[str, torch.Tensor]) -> None:
            for (name, gradient), hook in zip(gradients.items(), scheduler.backward_hook_objects, strict=True):
                weights[name].grad = gradient
                if hook is not None:
                    hook.dense_grad = gradient
            scheduler._rigl_step()

        return Masked(optimizer.step, explore)

    package(clone, "sparsimony")
    sys.modules.setdefault("deepspeed", ModuleType("deepspeed"))
    from sparsimony.api import rigl

    sparsifier = rigl(optimizer, 1 - density, t_end=10**9, delta_t=every, pruning_ratio=0.5)
    layers = [name.removesuffix(".weight") for name in weights]
    sparsifier.prepare(network, [{"tensor_fqn": f"{layer}.weight"} for layer in layers])

    def explore(gradients: dict[str, torch.Tensor]) -> None:
        for layer in layers:
            parametrization = network.get_submodule(layer).parametrizations.weight[0]  # type: ignore[union-attr]
            parametrization.dense_grad = gradients[f"{layer}.weight"]
        sparsifier.step()

    return Masked(optimizer.step, explore)
