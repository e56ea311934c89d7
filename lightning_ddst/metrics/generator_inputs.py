"""The inputs of a generator's first calls in training, to generate images as training does."""

from collections.abc import Iterator, Mapping
from itertools import chain, zip_longest
from typing import Any, TypeAlias

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_ddst.utils import distributed
from lightning_ddst.utils.cache import digest
from lightning_ddst.utils.compilation import uncompiled
from lightning_ddst.utils.modules import eval_mode
from lightning_ddst.utils.nested import get_first_tensor, leaves_in, tensors_in
from lightning_ddst.utils.states import ANYTHING, COUNT, FLAG, each

Recorded: TypeAlias = tuple[tuple[Any, ...], dict[str, Any], int]
"""A call's arguments, and the number of images that it made."""

_MOST_IMAGES = 10_000
_MOST_BYTES = 2**26


class GeneratorInputs:
    """A recorder of a generator's inputs by hooks.

    Recorded are the first calls in training steps, also those without gradients, and each distinct input once: a
    generator that is called twice with the same noise counts once. The recorded inputs never change afterwards, so
    samples at different times differ only by the weights. Nothing is drawn anew, because the distribution of the noise
    is unknown.

    Args:
        wanted: Number of images to record inputs for, in all processes. By default 10,000, but at most 64 MB.

    Attributes:
        recording: Whether calls are recorded; False at first.
        images: Number of images that the recorded calls of this process made.
        state_form: The form of a saved state.
    """

    state_form = {"processes": each(each((ANYTHING, ANYTHING, COUNT))), "complete": FLAG}  # noqa: RUF012

    def __init__(self, wanted: int | None = None) -> None:
        self._wanted = wanted or _MOST_IMAGES
        self._limit = float("inf") if wanted else _MOST_BYTES
        self.recording = False
        self.clear()

    def clear(self) -> None:
        """Forgets every input."""
        self._calls: list[Recorded] = []
        self._running: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._known: set[str] = set()
        self.images = self._bytes = 0
        self._complete = False

    def attach(self, generator: nn.Module) -> list[RemovableHandle]:
        """Registers hooks on the generator; returns their handles."""
        return [
            generator.register_forward_pre_hook(self._before, with_kwargs=True),
            generator.register_forward_hook(self._after, with_kwargs=True),
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> "GeneratorInputs":
        """Returns an idle recorder: the hooks of a copied generator record nothing."""
        return GeneratorInputs()

    def __getstate__(self) -> dict[str, Any]:
        return GeneratorInputs().__dict__

    def _is_recording(self) -> bool:
        own = self._wanted / distributed.get_world_size()
        return self.recording and not self._complete and self.images < own and self._bytes < self._limit

    @uncompiled
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_recording():
            self._running.append((_copied(args), _copied(kwargs)))

    @uncompiled
    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._running:
            return
        inputs, self._running = self._running[-1], []  # earlier ones ended with an error
        self._add(*inputs, len(get_first_tensor(output)))

    def _add(self, args: tuple[Any, ...], kwargs: dict[str, Any], images: int) -> None:
        tensors = [tensor for _, tensor in tensors_in((args, kwargs))]
        others = [leaf for _, leaf in leaves_in((args, kwargs)) if not isinstance(leaf, Tensor)]
        known = digest(*tensors, others)
        if tensors and known in self._known:  # without tensors the generator draws its own noise in every call
            return
        self._known.add(known)
        self._calls.append((args, kwargs, images))
        self.images += images
        self._bytes += sum(tensor.nbytes for tensor in tensors)

    def complete(self) -> int:
        """Ends recording, and shares the inputs among processes; every process must call it.

        Returns:
            The number of images that can be generated.
        """
        self._running = []
        if not self._complete:
            rounds = zip_longest(*distributed.all_gather(self._calls))
            self._calls = [call for call in chain.from_iterable(rounds) if call is not None]
            self._complete = bool(self._calls)
        return sum(images for *_, images in self._calls)

    def repeat(self, generator: nn.Module, total: int, seed: int, device: torch.device) -> Iterator[Tensor]:
        """Generates images in evaluation mode from this process's share of the inputs, after `complete`.

        Random numbers that the generator itself draws are seeded, in the random states of training: restore these.

        Args:
            generator: The generator.
            total: Number of images in all processes, at most those recorded.
            seed: Seed of the generator's own random numbers.
            device: The device.

        Yields:
            Images of one call.
        """
        batches: list[tuple[Recorded, int]] = []
        for call in self._calls:
            if total > 0:
                batches.append((call, min(call[2], total)))
                total -= call[2]
        seeds = torch.randint(2**32, (len(batches),), generator=torch.Generator().manual_seed(seed)).tolist()
        for start in range(0, len(batches), distributed.get_world_size()):
            number = start + distributed.get_rank()
            # Every process calls the generator equally often: FSDP gathers parameters in all processes at once.
            place = min(number, len(batches) - 1)
            call, images = batches[place]
            output = _repeat(generator, call, seeds[place], device)
            if number < len(batches):
                yield output[:images]

    def shape(self, generator: nn.Module, device: torch.device) -> torch.Size:
        """Returns the shape of one generated image, after `complete`."""
        return _repeat(generator, self._calls[0], 0, device).shape[1:]

    def state_dict(self) -> dict[str, Any]:
        """Returns the inputs of all processes; loads with ``weights_only=True``."""
        processes = [self._calls] if self._complete else distributed.all_gather(self._calls)
        return {"processes": processes, "complete": self._complete}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state returned by `state_dict`."""
        self.clear()
        rank, world = distributed.get_rank(), distributed.get_world_size()
        processes = state["processes"] if state["complete"] else state["processes"][rank::world]
        for args, kwargs, images in chain.from_iterable(processes):
            self._add(tuple(args), dict(kwargs), images)
        self._complete = state["complete"]


def _repeat(generator: nn.Module, call: Recorded, seed: int, device: torch.device) -> Tensor:
    args, kwargs, _ = call
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed all devices
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    with eval_mode(generator):
        return get_first_tensor(generator(*move_data_to_device(args, device), **move_data_to_device(kwargs, device)))


def _copied(value: Any) -> Any:
    """Copies a nesting of lists, tuples and dicts; tensors to the CPU.

    Raises:
        TypeError: For other values, which a checkpoint could not hold.
    """
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value)) if type(value) in (list, tuple) else tuple(map(_copied, value))
    if isinstance(value, Mapping):
        return {name: _copied(entry) for name, entry in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"SampleQuality cannot repeat a call of the generator with a {type(value).__name__}: give the module a method "
        "sample(n, rng=...)."
    )
