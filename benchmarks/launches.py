"""Counts the kernels that a training update launches, and how often it waits for the device, without a GPU.

    python benchmarks/launches.py [--granularity weight channel] [--operations]
        [--authors CLONE] [--rigl-torch CLONE] [--sparsimony CLONE]

The paper's SNGAN pair (11 + 11 weights) trains under Lightning's Trainer on a CPU. Counted are the operations that
PyTorch dispatches, in forward and backward passes, optimizers, hooks and callbacks, from the start of a batch to its
end: one kernel for each operation, none for views, allocations and metadata. An operation whose result a program on a
GPU could not have without waiting for the device is a wait. So the numbers are exact and repeatable, and they stand for
those of a GPU: some operations launch several kernels there, as convolutions do. Numbers do not depend on the width,
which is small here.

A kind of update is counted where nothing else happens, and what a dense update launches is subtracted. The means over
runs follow from the kinds and the default intervals. `--operations` prints which operations make up each kind.
"""

import argparse
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peers
import torch
from kinds import DENSITY, EXPLORATION, FIRST, KINDS, MEASUREMENT, ORDINARY, length, mean_kinds, short_runs, sort
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from overhead import trainer
from rows import add, origin
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_ddst import DynamicSparsityCallback, GANModule, GeneratorEMA
from lightning_ddst.balance import Balance, BalanceWindow
from lightning_ddst.gan.module import paper_adam
from lightning_ddst.models import SNGANDiscriminator, SNGANGenerator
from lightning_ddst.sparsity import maskable_weights
from lightning_ddst.utils.devices import simulate_launch_bound

WIDTH, BATCH = 64, 2

# ---- counting ------------------------------------------------------------------------------------------

LAUNCH_NOTHING = {
    *("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"),
    *("_unsafe_view", "lift_fresh", "set_", "resize_", "is_same_size", "promote_types", "is_pinned"),
    "_local_scalar_dense",
}
"""Besides views: operations that allocate, describe, or copy a number to the host."""
WAIT = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"),
    *("_unique2", "unique_dim", "unique_consecutive", "bincount"),
    *("_linalg_eigh", "_linalg_svd"),
}
"""Operations that return a number, or a tensor whose size depends on values, or look whether they converged."""
TO_THE_HOST = {Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__array__}
FROM_THE_HOST = {torch.tensor, torch.as_tensor}
"""Operations that wait for a copy of pageable memory if a device is given."""
FEW_TENSORS = (110, 64, 48, 36, 30)
"""Tensors that one kernel of a `_foreach` operation takes, by its number of lists, from 1."""


@dataclass(frozen=True)
class Count:
    """Kernels launched, waits for the device, and the operations that launch."""

    launches: float = 0
    waits: float = 0
    operations: Mapping[str, int] = field(default_factory=Counter, compare=False)

    def __add__(self, other: "Count") -> "Count":
        return Count(self.launches + other.launches, self.waits + other.waits)

    def __sub__(self, other: "Count") -> "Count":
        operations = Counter(self.operations)
        operations.subtract(other.operations)
        return Count(self.launches - other.launches, self.waits - other.waits, operations)

    def __truediv__(self, number: float) -> "Count":
        return Count(self.launches / number, self.waits / number)

    def __str__(self) -> str:
        return f"{self.launches:.4g} / {self.waits:.2g}" if self.waits % 1 else f"{self.launches:.4g} / {self.waits:g}"


class Counting:
    """Counts what happens inside the context, which begins anew every time."""

    def __init__(self) -> None:
        self._operations: Counter[str] = Counter()
        self._waits = 0
        self._paused = False

    @property
    def count(self) -> Count:
        return Count(sum(self._operations.values()), self._waits, Counter(self._operations))

    @contextmanager
    def on_the_host(self) -> Iterator[None]:
        """Counts nothing inside the context but one copy from the device, which is converted before."""
        self._operations["_to_copy"] += 1
        self._waits += 1
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def dispatched(self, operation: Any, args: Sequence[Any]) -> None:
        if self._paused:
            return
        name = operation.overloadpacket.__name__
        self._waits += name in WAIT or selects_by_mask(name, args)
        if launched := launches(operation, name, args):
            self._operations[name] += launched

    def called(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if self._paused:
            return
        self._waits += (
            function in TO_THE_HOST
            or (function is Tensor.to and "cpu" in (*args[1:2], kwargs.get("device")))
            or (function in FROM_THE_HOST and kwargs.get("device") is not None)
        )

    def __enter__(self) -> "Counting":
        self._operations = Counter()
        self._waits = 0
        with ExitStack() as stack:
            stack.enter_context(_Calls(self))
            stack.enter_context(_Dispatched(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stack.__exit__(*raised)


class _Dispatched(TorchDispatchMode):
    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self._counting = counting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._counting.dispatched(func, args)
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """Sees what copies tensors to the host, which is no operation where they are on a CPU already."""

    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self._counting = counting

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._counting.called(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def launches(operation: Any, name: str, args: Sequence[Any]) -> int:
    """The number of kernels that an operation launches on a GPU, as far as operations tell."""
    if operation.namespace != "aten" or operation.is_view or name in LAUNCH_NOTHING:
        return 0
    if not name.startswith("_foreach_"):
        return 1
    lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor)]
    tensors = len(lists[0])
    if name != "_foreach_copy_" and len({tensor.dtype for each in lists for tensor in each}) > 1:
        return tensors  # the slow path
    return -(-tensors // FEW_TENSORS[len(lists) - name.endswith("_")])


def selects_by_mask(name: str, args: Sequence[Any]) -> bool:
    """Whether an index is a bool mask, whose true entries a GPU has to count first, unless it fills with a number."""
    if name not in ("index", "index_put", "index_put_"):
        return False
    fills = name != "index" and args[2].numel() == 1
    return not fills and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


# ---- updates -------------------------------------------------------------------------------------------


class BatchStart(Callback):
    """Begins to count, at every batch from the given one on; the first callback."""

    def __init__(self, counting: Counting, first: int) -> None:
        self._counting, self._first = counting, first

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx >= self._first:
            self._counting.__enter__()


class BatchEnd(Callback):
    """Keeps the batch's count; the last callback."""

    def __init__(self, counting: Counting, first: int) -> None:
        self._counting, self._first = counting, first
        self.counts: list[Count] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx >= self._first:
            self._counting.__exit__(None, None, None)
            self.counts.append(self._counting.count)


@contextmanager
def window_on_the_host(counting: Counting) -> Iterator[None]:
    """Counts that a window of measurements is copied once, and that its means are computed from the copy.

    Where the measurements are on the CPU already, there is no operation that says so.
    """
    compute = BalanceWindow.read

    def read(window: BalanceWindow) -> Balance:
        with counting.on_the_host():
            return compute(window)

    with patch.object(BalanceWindow, "read", read):
        yield


def count_updates(callbacks: Sequence[Callback], updates: int, first: int = 3) -> dict[int, Count]:
    """Counts updates of a run, one D step and one G step each, as they are on a GPU.

    Args:
        callbacks: The Trainer's.
        updates: The last update that is counted; one more is made, because an epoch ends with it.
        first: The first update that is counted; the very first ones make states of optimizers and check much.
    """
    seed_everything(0, verbose=False)
    counting = Counting()
    end = BatchEnd(counting, first - 1)
    gan = GANModule(SNGANGenerator(width=WIDTH), SNGANDiscriminator(width=WIDTH))
    images = TensorDataset(torch.rand((updates + 1) * BATCH, 3, 32, 32) * 2 - 1)
    made = trainer([BatchStart(counting, first - 1), *callbacks, end], epochs=1)
    with simulate_launch_bound(), window_on_the_host(counting):
        made.fit(gan, DataLoader(images, batch_size=BATCH))
    return dict(enumerate(end.counts[:-1], first))


def worst(counts: Iterable[Count]) -> Count:
    """The largest of several counts of a kind: how many passes a mask update takes depends on the weights."""
    return max(counts, key=lambda count: (count.launches, count.waits))


AVERAGE, MOMENTUM = "GeneratorEMA", 'ordinary update, growth="momentum"'


def count_kinds(granularity: str = "weight", changes: int = 1) -> tuple[Count, dict[str, Count]]:
    """Counts a dense update, and what an update of each kind adds to it.

    Args:
        granularity: Of the masks; those of channels do not grow by momentum.
        changes: Mask changes that are counted. The worst counts.
    """
    found: dict[str, list[Count]] = {}
    for change, callback in short_runs(granularity).items():
        for kind, each in sort(count_updates([callback], length(changes), FIRST), change).items():
            found.setdefault(kind, []).extend(each)
    dense = count_updates([], 3)[3]
    kinds = {kind: worst(found[kind]) - dense for kind in KINDS}
    kinds[AVERAGE] = count_updates([GeneratorEMA()], 3)[3] - dense
    if granularity == "weight":
        momentum = DynamicSparsityCallback(DENSITY, method="sdst", growth="momentum", probe_interval=None)
        kinds[MOMENTUM] = count_updates([momentum], 3)[3] - dense
    return dense, kinds


# ---- other people's code -------------------------------------------------------------------------------


def counted(function: Callable[[], object]) -> Count:
    with Counting() as counting:
        function()
    return counting.count


def count_peer(clone: Path, peer: str) -> dict[str, Count]:
    """Counts what another implementation adds to a dense update, of the kinds that it has."""
    torch.manual_seed(0)
    generator, discriminator = SNGANGenerator(width=WIDTH), SNGANDiscriminator(width=WIDTH)
    z, real = torch.randn(BATCH, generator.latent_dim), torch.rand(BATCH, 3, 32, 32)

    def update(network: torch.nn.Module, argument: Tensor, step: Callable[[], object]) -> Count:
        for _ in range(3):  # the first ones make states of optimizers
            for parameter in network.parameters():
                parameter.grad = None
            count = counted(lambda: (network(argument).mean().backward(), step()))
        return count

    kinds = {ORDINARY: Count()}
    networks = {generator: z, discriminator: real} if peer == "authors" else {generator: z}
    for network, argument in networks.items():
        dense = update(network, argument, paper_adam(network.parameters()).step)
        masked = peers.attach(clone, peer, network, DENSITY, every=10**6)
        kinds[ORDINARY] += update(network, argument, masked.step) - dense
    generator = SNGANGenerator(width=WIDTH)
    gradients = {weight.name: torch.randn_like(weight.parameter) for weight in maskable_weights(generator)}
    masked = peers.attach(clone, peer, generator, DENSITY, every=1)
    kinds[EXPLORATION] = kinds[ORDINARY] + worst([counted(lambda: masked.explore(gradients)) for _ in range(3)])
    if peer == "authors":
        kinds[MEASUREMENT] = kinds[ORDINARY] + counted(lambda: their_measurement(generator, discriminator, z, real))
        average = [parameter.detach().clone() for parameter in generator.parameters()]
        kinds[AVERAGE] = counted(lambda: their_average(average, generator))
    return kinds


@torch.no_grad()
def their_measurement(generator: torch.nn.Module, discriminator: torch.nn.Module, z: Tensor, real: Tensor) -> None:
    """The paper's measurement in its effect: the fakes' earlier scores are at hand, and each mean is read at once."""
    earlier = torch.zeros(BATCH, 1)
    for scores in (earlier, discriminator(generator(z)), discriminator(real)):
        scores.mean().item()


@torch.no_grad()
def their_average(average: Sequence[Tensor], network: torch.nn.Module) -> None:
    """The paper's average in its effect."""
    for mean, parameter in zip(average, network.parameters(), strict=True):
        mean.mul_(0.999).add_(parameter, alpha=0.001)


# ---- the command ---------------------------------------------------------------------------------------


def keep(who: str, granularity: str, dense: Count, kinds: Mapping[str, Count], command: str) -> None:
    for kind, count in {"dense update": dense, **kinds}.items():
        row = {
            "who": who,
            "granularity": granularity,
            "what": kind,
            "launches": round(count.launches, 1),
            "waits": round(count.waits, 2),
            "of_dense": round(count.launches / dense.launches, 3),
            "command": command,
        }
        add("launches", row | origin())


def show(title: str, columns: Mapping[str, Mapping[str, Count]]) -> None:
    print(f"\n{title}: launches / waits\n\n{'':40}" + "".join(f"{name:>20}" for name in columns))
    for kind in dict.fromkeys(kind for column in columns.values() for kind in column):
        print(f"{kind:40}" + "".join(f"{column.get(kind, '')!s:>20}" for column in columns.values()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers.add_arguments(parser)
    choices = ["weight", "channel"]
    parser.add_argument("--granularity", nargs="+", choices=choices, default=choices, help="of the masks")
    parser.add_argument("--operations", action="store_true", help="print which operations launch")
    options = vars(parser.parse_args())
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    command = "python benchmarks/launches.py"
    clones = {peer: options[peer.replace("-", "_")] for peer in peers.PEERS}
    for granularity in options["granularity"]:
        dense, kinds = count_kinds(granularity, changes=5)
        columns = {"lightning_ddst": kinds | mean_kinds(kinds)}
        if granularity == "weight":
            theirs = {peer: count_peer(clone, peer) for peer, clone in clones.items() if clone is not None}
            columns |= {peer: each | mean_kinds(each) if MEASUREMENT in each else each for peer, each in theirs.items()}
        show(f"masks of {granularity}s, added to a dense update, which launches {dense}", columns)
        for who, column in columns.items():
            keep(who, granularity, dense, column, command)
        if options["operations"]:
            for kind, count in kinds.items():
                added = Counter(count.operations).most_common()
                print(f"\n{kind}: " + ", ".join(f"{name} {number}" for name, number in added if number))


if __name__ == "__main__":
    main()
