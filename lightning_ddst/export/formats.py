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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lightning_ddst.export.traced import Computation
from lightning_ddst.sparsity.averaging import average_states
from lightning_ddst.sparsity.bitpack import view_as_integers
from lightning_ddst.sparsity.reparametrized import copy_network, fold_weight_norm, has_weight_norm
from lightning_ddst.sparsity.spectral import spectral_norms
from lightning_ddst.utils import cache
from lightning_ddst.utils.checkpoints import AVERAGES, describe_error, find_damage
from lightning_ddst.utils.lightning_private import state_key_of
from lightning_ddst.utils.nested import Place
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
        weights: "average", those of `GeneratorEMA`, or the generator's own if the checkpoint shows that the run had no
            `GeneratorEMA`; or "raw", the generator's own.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the file is damaged, not a checkpoint of Lightning, of another generator, or without an average
            of a run that may have had one; the generator does not change in this case.
    """
    check_choice("weights", weights, ("average", "raw"))
    if name is not None and not isinstance(name, str):
        raise ValueError(f"name={name!r} must be one name: load the parts of a generator one by one.")
    content = _read(Path(checkpoint))
    state: Mapping[str, Tensor] = content["state_dict"]
    if weights == "raw":  # Lightning's WeightAveraging saves its average as the state_dict
        state = content.get("current_model_state", state)
    name = _name(state, name)
    values = _part(state, name)
    if weights == "average":
        values |= _averages(content, name, checkpoint)
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


def _read(path: Path) -> Mapping[str, Any]:
    """Reads a checkpoint that has a ``state_dict``."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}.")
    if damage := find_damage(path):
        raise ValueError(f"{path} is damaged, or not a checkpoint: {damage}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load may raise anything for a damaged file
        raise ValueError(f"{path} is damaged, or not a checkpoint: {describe_error(error)}.") from error
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of Lightning: it has no state_dict.")
    return checkpoint


def _name(state: Mapping[str, Tensor], name: str | None) -> str:
    """Returns the generator's name in the module."""
    names = USUAL_NAMES["generator"] if name is None else (name,)
    found = _usual_name(state) if name is None else name
    if found is not None and _has(state, found):
        return found
    there = ", ".join(sorted({key.partition(".")[0] for key in state})) or "nothing"
    raise ValueError(f"no generator is in the checkpoint under {', '.join(names)}; it has {there}: give its name.")


def _averages(content: Mapping[str, Any], name: str, checkpoint: str | Path) -> dict[str, Tensor]:
    """Returns the averages of `GeneratorEMA`, by names in the generator; none if the run had no `GeneratorEMA`."""
    states = content.get("callbacks", content.get(AVERAGES))
    instead = 'weights="raw" (--weights raw) loads the generator\'s own weights'
    if states is None:
        raise ValueError(
            f"{checkpoint} was saved without states of callbacks and holds no average of GeneratorEMA: {instead}."
        )
    averages = average_states(states)
    named = [state for key, state in averages.items() if key.endswith(state_key_of("", generator=name))]
    usual = _usual_name(content["state_dict"])
    unnamed = [state for key, state in averages.items() if "{'generator': " not in key and name == usual]
    parts = [{"averages": _part(state["averages"], name)} for key, state in averages.items() if "': [" in key]
    found = named or unnamed or [state for state in parts if state["averages"]]  # of a generator of several parts
    if len(found) > 1:
        raise ValueError(f"the checkpoint has {len(found)} averages, but none of the generator {name!r} by name.")
    if not found and averages:
        raise ValueError(f"{checkpoint} has averages of {', '.join(averages)}, and none of {name!r}: {instead}.")
    return dict(found[0]["averages"]) if found else {}


def _usual_name(state: Mapping[str, Tensor]) -> str | None:
    """Returns the name under which `find_network` finds the generator: in the module, or else in one submodule."""
    usual = USUAL_NAMES["generator"]
    children = sorted({key.partition(".")[0] for key in state})
    own = [name for name in usual if _has(state, name)]
    inside = [next((f"{child}.{name}" for name in usual if _has(state, f"{child}.{name}")), None) for child in children]
    found = own[:1] or [name for name in inside if name is not None]
    return found[0] if len(found) == 1 else None


def _part(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Returns the entries of one submodule, by their names in it."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def _has(state: Mapping[str, Tensor], name: str) -> bool:
    return any(key.startswith(f"{name}.") for key in state)


# ---- files -----------------------------------------------------------------------------------------------


def save_dense(generator: nn.Module, path: str | Path) -> None:
    """Writes the ``state_dict`` to a safetensors file.

    Weights under weight norm are written as plain weights, which load after `fold_weight_norm(generator)`.

    Raises:
        OSError: If the file cannot be written.
    """
    _save(_state(generator), Path(path), None)


def save_compressed(generator: nn.Module, path: str | Path) -> None:
    """Writes the ``state_dict``, with bits and values instead of tensors if that is smaller.

    Of such a tensor ``name`` there are ``name.bits``, uint8 ``(ceil(n / 8),)``, in which the entry with
    flat index i is the bit of value ``128 >> i % 8`` in byte ``i // 8``, 1 where it is not 0; and
    ``name.values``, those entries in order. The metadata's ``shapes`` has the tensor's shape, as JSON, and its
    ``digest`` a digest of the contents. Weights under weight norm are written as in `save_dense`.

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
    metadata = {"format": FORMAT, "shapes": json.dumps(shapes)}
    _save(tensors, Path(path), metadata | {"digest": _digest(tensors, metadata["shapes"])})


def load_compressed(path: str | Path) -> dict[str, Tensor]:
    """Reads the ``state_dict`` from a file of `save_compressed`, bit for bit.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or has another format. A file without a digest, of an earlier version, is
            read if its parts fit together.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # whatever a damaged header leads to
        raise ValueError(f"{path} is damaged, or not a safetensors file: {cache.first_line(error)}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} has the format {metadata.get('format')!r}, not {FORMAT!r}.")
    shapes = metadata.get("shapes", "")
    if "digest" in metadata and metadata["digest"] != _digest(tensors, shapes):
        raise ValueError(f"{path} is damaged: its contents do not match their digest.")
    try:
        return _decoded(tensors, json.loads(shapes))
    except (ValueError, KeyError) as error:  # json's and of types without integers of their size, too
        raise ValueError(f"{path} is damaged: {cache.first_line(error)}.") from error


def _digest(tensors: Mapping[str, Tensor], shapes: str) -> str:
    return cache.digest(FORMAT, {name: tensors[name] for name in sorted(tensors)}, shapes)


def _decoded(tensors: dict[str, Tensor], shapes: Any) -> dict[str, Tensor]:
    """Replaces bits and values by dense tensors.

    Raises:
        ValueError: If the parts do not fit together.
    """
    if not isinstance(shapes, dict):
        raise ValueError(f"shapes={shapes!r} must be a JSON object")
    decoded = dict(tensors)
    for name, shape in shapes.items():
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"the shape {shape!r} of {name!r} must be a list of sizes")
        if name in tensors or name + _BITS not in decoded or name + _VALUES not in decoded:
            raise ValueError(f"of {name!r} it must hold {name + _BITS!r} and {name + _VALUES!r}, and no other tensor")
        decoded[name] = _dense(name, shape, decoded.pop(name + _BITS), decoded.pop(name + _VALUES))
    return decoded


def _dense(name: str, shape: list[int], bits: Tensor, values: Tensor) -> Tensor:
    entries = math.prod(shape)
    length = -(-entries // 8)
    if bits.dtype != torch.uint8 or bits.shape != (length,):
        found = f"{bits.dtype} {tuple(bits.shape)}"
        raise ValueError(f"{name + _BITS!r} is {found} and must be {torch.uint8} {(length,)} for the shape {shape}")
    unpacked = np.unpackbits(bits.numpy())
    present = torch.from_numpy(unpacked[:entries].astype(bool))
    if unpacked[entries:].any():
        raise ValueError(f"{name + _BITS!r} has bits after its {entries} entries")
    if values.shape != (int(present.sum()),) or not bool((view_as_integers(values) != 0).all()):
        raise ValueError(
            f"{name + _VALUES!r} has the shape {tuple(values.shape)} and must hold {int(present.sum())} values, none 0"
        )
    return values.new_zeros(entries).masked_scatter_(present, values).view(shape)


def save_onnx(generator: nn.Module, path: str | Path, *inputs: Any, output: Place | None = None) -> float:
    """Writes the generator in evaluation mode as an ONNX file, and compares onnxruntime's images with torch's.

    Weights under weight norm are written as plain weights.

    Args:
        generator: Module from `inputs` to images, or to a tuple, list, mapping or dataclass that holds them.
        path: Path of the file.
        inputs: Example arguments; the first dimension of each tensor is the batch, whose size stays free, or a warning
            tells that the generator's code fixes it.
        output: The place of the images in what the generator returns: a key, an index, or a path such as "0.image";
            None means the only tensor.

    Returns:
        The largest difference of a pixel from torch's, for images in [-1, 1]; at most 1e-3.

    Raises:
        ImportError: If onnx, onnxruntime and onnxscript are missing: install ``lightning-ddst[onnx]``.
        ValueError: If the generator cannot be expressed in ONNX, its images differ by more or are random, or `output`
            names no tensor.
        OSError: If the file cannot be written.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 -- torch's exporter needs it
    except ImportError as error:
        raise ImportError(f"{error}: for ONNX install lightning-ddst[onnx].") from error
    kind = type(generator).__name__
    computation = Computation(generator, inputs, output)
    refusal = f"{kind} cannot be written for ONNX"
    if computation.is_random():
        raise ValueError(
            f"{refusal}: its images are random in evaluation mode, so they cannot be compared. Pass the noise as an "
            "argument."
        )
    with torch.no_grad(), _written(Path(path)) as temporary:
        try:
            program = torch.onnx.export(
                computation.network,
                computation.example,
                dynamo=True,
                dynamic_shapes=computation.shapes,
                input_names=list(computation.tensors),
                verbose=False,
            )
            assert program is not None
            program.save(temporary)
        except Exception as error:  # the exporter may raise anything for the user's network
            raise ValueError(f"{refusal}: {computation.why_not(error)}.") from error
        try:
            session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
            known = session.get_inputs()
            there = session.run(None, {each.name: computation.tensors[each.name].numpy() for each in known})[0]
        except Exception as error:  # of onnxruntime's own classes
            raise ValueError(f"onnxruntime cannot run {kind}: {cache.first_line(error)}") from error
        if any(isinstance(size, int) for each in known for size in each.shape[:1]):
            computation.warn_of_fixed_batch()
        difference = float(np.abs(there - computation.images.numpy()).max())
        if not difference <= _ONNX_DIFFERS:  # also rejects NaN
            raise ValueError(
                f"under onnxruntime the images of {kind} differ from torch's by up to "
                f"{difference:.2g}; allowed are {_ONNX_DIFFERS:g}."
            )
    return difference


def save_program(generator: nn.Module, path: str | Path, *inputs: Any, output: Place | None = None) -> None:
    """Writes the generator in evaluation mode as a program, which ``torch.export.load(path).module()`` runs.

    Weights under weight norm are written as plain weights.

    Args:
        generator: Module from `inputs` to images, or to a tuple, list, mapping or dataclass that holds them.
        path: Path of the file; its name ends in ".pt2".
        inputs: Example arguments; the first dimension of each tensor is the batch, whose size stays free, or a warning
            tells that the generator's code fixes it.
        output: The place of the images in what the generator returns, as in `save_onnx`.

    Raises:
        ValueError: If the generator cannot be expressed as a program, or `output` names no tensor.
        OSError: If the file cannot be written.
    """
    computation = Computation(generator, inputs, output)
    with torch.no_grad(), _written(Path(path)) as temporary:
        buffer = BytesIO()
        try:
            torch.export.save(computation.to_program(), buffer)
        except Exception as error:  # torch may raise anything for the user's network
            raise ValueError(
                f"{type(generator).__name__} cannot be written as a program: {computation.why_not(error)}."
            ) from error
        temporary.write_bytes(buffer.getvalue())


def _state(generator: nn.Module) -> dict[str, Tensor]:
    """Copies the ``state_dict`` as files hold it: weight norm is folded in, tied weights are separate tensors."""
    if has_weight_norm(generator):
        generator = copy_network(generator)
        fold_weight_norm(generator)
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in generator.state_dict().items()
    }


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
