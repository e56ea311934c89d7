"""Files of a checkpoint's trained generator, which do not need this package.

- **dense**: a safetensors file with the generator's ``state_dict``, including zeros.
- **compressed**: a safetensors file that holds tensors with many zeros as one bit per entry and the values of
  the non-zero entries. ``docs/export.md`` has a decoder of a few lines.
- **onnx**: the generator in evaluation mode, for onnxruntime and others.
- **program**: the same for torch, with `torch.export`; it does not need the generator's class either.

The last two hold computations, so their layers can be smaller: see `lightning_ddst.sparsity.channels.slim`.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lightning_ddst.sparsity.bitpack import view_as_integers
from lightning_ddst.sparsity.spectral import spectral_norms
from lightning_ddst.utils import cache
from lightning_ddst.utils.lightning_private import state_key_of
from lightning_ddst.utils.networks import USUAL_NAMES
from lightning_ddst.utils.validation import check_choice

Weights = Literal["average", "raw"]

FORMAT = "lightning_ddst.bitmask.1"
"""Format of compressed files, stored in their metadata under ``format``."""
_BITS, _VALUES = ".bits", ".values"
_ONNX_DIFFERS = 1e-3


# ---- checkpoints -----------------------------------------------------------------------------------------


def load_generator(
    generator: nn.Module, checkpoint: str | Path, name: str | None = None, weights: Weights = "average"
) -> None:
    """Loads the weights that a generator had in a run's evaluation.

    Args:
        generator: A network like the trained one, with other weights.
        checkpoint: Path of Lightning's checkpoint.
        name: The generator's dotted name in the trained module; by default the usual names are tried.
        weights: "average", the average of `GeneratorEMA` if the run had one; or "raw", the generator's own weights.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the file is damaged, not a checkpoint of Lightning, or of another generator; the generator does
            not change in this case.
    """
    check_choice("weights", weights, ("average", "raw"))
    state, callbacks = _read(Path(checkpoint))
    name = _name(state, name)
    values = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    if weights == "average":
        values |= _averages(callbacks, name)
    own = generator.state_dict()
    for key in sorted(own.keys() | values.keys()):
        if key not in own or key not in values or own[key].shape != values[key].shape:
            here = tuple(own[key].shape) if key in own else "missing"
            there = tuple(values[key].shape) if key in values else "missing"
            raise ValueError(
                f"{checkpoint} is of another generator than this {type(generator).__name__}: {key!r} is {there} there, "
                f"and {here} here."
            )
    generator.load_state_dict(values)
    if weights == "average":
        for spectral in spectral_norms(generator):
            spectral.refresh()  # as in evaluation: the saved vectors belong to the own weights


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The module's state and the callbacks' states."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load may raise anything for a damaged file
        raise ValueError(f"{path} is damaged, or not a checkpoint: {cache.first_line(error)}") from error
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of Lightning: it has no state_dict.")
    return checkpoint["state_dict"], checkpoint.get("callbacks", {})


def _name(state: Mapping[str, Tensor], name: str | None) -> str:
    """Returns the generator's name in the module."""
    names = USUAL_NAMES["generator"] if name is None else (name,)
    for usual in names:
        if any(key.startswith(f"{usual}.") for key in state):
            return usual
    there = ", ".join(sorted({key.partition(".")[0] for key in state})) or "nothing"
    raise ValueError(f"no generator is in the checkpoint under {', '.join(names)}; it has {there}: give its name.")


def _averages(callbacks: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Returns the averages of `GeneratorEMA` by names in the generator; empty if the run had no average."""
    averages = [state for key, state in callbacks.items() if key.startswith("GeneratorEMA") and state]
    named = [callbacks.get(state_key_of("GeneratorEMA", generator=name))]
    found = [state for state in named if state] or averages
    if len(found) > 1:
        raise ValueError(f"the checkpoint has {len(found)} averages, but none of the generator {name!r} by name.")
    return dict(found[0]["averages"]) if found else {}


# ---- files -----------------------------------------------------------------------------------------------


def save_dense(generator: nn.Module, path: str | Path) -> None:
    """Writes the ``state_dict`` to a safetensors file.

    Raises:
        OSError: If the file cannot be written.
    """
    _save(_state(generator), Path(path), None)


def save_compressed(generator: nn.Module, path: str | Path) -> None:
    """Writes the ``state_dict``, with bits and values instead of tensors if that is smaller.

    The file then holds two tensors for ``name``. ``name.bits``, uint8 ``(ceil(n / 8),)``, marks the non-zero entries:
    the entry with flat index i is the bit of value ``128 >> i % 8`` in byte ``i // 8``. ``name.values`` holds the
    non-zero entries in order. The metadata's ``shapes`` holds the tensor's shape, as JSON.

    Raises:
        OSError: If the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, value in _state(generator).items():
        flat = value.flatten()
        # Compares bits, because a negative zero must be kept.
        present = view_as_integers(flat) != 0
        bits = torch.from_numpy(np.packbits(present.numpy()))
        held = flat[present]
        if bits.nbytes + held.nbytes < flat.nbytes:
            shapes[name] = list(value.shape)
            tensors |= {name + _BITS: bits, name + _VALUES: held}
        else:
            tensors[name] = value
    _save(tensors, Path(path), {"format": FORMAT, "shapes": json.dumps(shapes)})


def load_compressed(path: str | Path) -> dict[str, Tensor]:
    """Reads the ``state_dict`` from a file of `save_compressed`, bit for bit.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or has another format.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} has the format {metadata.get('format')!r}, not {FORMAT!r}.")
    for name, shape in json.loads(metadata["shapes"]).items():
        bits, values = tensors.pop(name + _BITS), tensors.pop(name + _VALUES)
        present = torch.from_numpy(np.unpackbits(bits.numpy(), count=math.prod(shape)).astype(bool))
        tensors[name] = values.new_zeros(math.prod(shape)).masked_scatter_(present, values).view(shape)
    return tensors


def save_onnx(generator: nn.Module, path: str | Path, *inputs: Tensor) -> float:
    """Writes the generator in evaluation mode as an ONNX file, and compares onnxruntime's images with torch's.

    Args:
        generator: Module from `inputs` to images.
        path: Path of the file.
        inputs: Example arguments; their first dimension is the batch, whose size stays free.

    Returns:
        The largest difference of a pixel from torch's, for images in [-1, 1]; at most 1e-3.

    Raises:
        ImportError: If onnx, onnxruntime and onnxscript are missing: install ``lightning-ddst[onnx]``.
        ValueError: If the generator cannot be expressed in ONNX, or its images differ by more.
        OSError: If the file cannot be written.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 -- torch's exporter needs it
    except ImportError as error:
        raise ImportError(f"{error}: for ONNX install lightning-ddst[onnx].") from error
    generator, example, shapes = _on_cpu(generator, inputs)
    with torch.no_grad(), _written(Path(path)) as temporary:
        try:
            program = torch.onnx.export(generator, example, dynamo=True, dynamic_shapes=shapes, verbose=False)
            assert program is not None
            program.save(temporary)
        except Exception as error:  # the exporter may raise anything for the user's network
            raise ValueError(
                f"{type(generator).__name__} cannot be written for ONNX: {cache.first_line(error)}"
            ) from error
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        fed = {known.name: value.numpy() for known, value in zip(session.get_inputs(), example, strict=True)}
        difference = float(np.abs(session.run(None, fed)[0] - generator(*example).numpy()).max())
        if not difference <= _ONNX_DIFFERS:  # also rejects NaN
            raise ValueError(
                f"under onnxruntime the images of {type(generator).__name__} differ from torch's by up to "
                f"{difference:.2g}; allowed are {_ONNX_DIFFERS:g}."
            )
    return difference


def save_program(generator: nn.Module, path: str | Path, *inputs: Tensor) -> None:
    """Writes the generator in evaluation mode as a program, which ``torch.export.load(path).module()`` runs.

    Args:
        generator: Module from `inputs` to images.
        path: Path of the file; its name ends in ".pt2".
        inputs: Example arguments; their first dimension is the batch, whose size stays free.

    Raises:
        ValueError: If the generator cannot be expressed as a program.
        OSError: If the file cannot be written.
    """
    generator, example, shapes = _on_cpu(generator, inputs)
    with torch.no_grad(), _written(Path(path)) as temporary:
        buffer = BytesIO()
        try:
            torch.export.save(torch.export.export(generator, example, dynamic_shapes=shapes), buffer)
        except Exception as error:  # torch may raise anything for the user's network
            raise ValueError(
                f"{type(generator).__name__} cannot be written as a program: {cache.first_line(error)}"
            ) from error
        temporary.write_bytes(buffer.getvalue())


def _on_cpu(
    generator: nn.Module, inputs: Sequence[Tensor]
) -> tuple[nn.Module, tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Returns a copy of a generator in evaluation mode, example arguments, and their dynamic shapes, on the CPU."""
    batch = torch.export.Dim("batch")
    return deepcopy(generator).cpu().eval(), tuple(i.detach().cpu() for i in inputs), tuple({0: batch} for _ in inputs)


def _state(generator: nn.Module) -> dict[str, Tensor]:
    """Returns the ``state_dict`` in the form of files: detached, contiguous, on the CPU."""
    return {name: value.detach().cpu().contiguous() for name, value in generator.state_dict().items()}


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    with _written(path) as temporary:
        temporary.write_bytes(save(tensors, metadata))


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """Yields a temporary path that replaces `path` atomically at the end of the context."""
    try:
        cache.check_writable(path.parent)
    except OSError as error:
        raise OSError(f"nothing can be written to {path.parent}: {error}. Choose another folder.") from error
    with cache.atomic_write(path) as temporary:
        yield temporary
