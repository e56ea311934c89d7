"""The command ``lightning-ddst export``: writes a run's generator to files that do not need this package."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningModule
from torch import nn

from lightning_ddst.export import formats as exports
from lightning_ddst.export.benchmark import WORTHWHILE, onnx_time_ratio, sparse_linears, time_ratio
from lightning_ddst.export.traced import Computation
from lightning_ddst.sparsity import compact
from lightning_ddst.sparsity.reparametrized import copy_network
from lightning_ddst.utils.checkpoints import why_no_checkpoint
from lightning_ddst.utils.command_line import OneLineParser
from lightning_ddst.utils.configurations import check_classes, read_yaml, without_optimizers
from lightning_ddst.utils.example_inputs import get_generator_inputs
from lightning_ddst.utils.modules import eval_mode
from lightning_ddst.utils.networks import find_network
from lightning_ddst.utils.parser_errors import explain

Format = Literal["dense", "compressed", "onnx", "program"]
_BATCH = 16


def export(args: Sequence[str]) -> list[Path]:
    """Writes a checkpoint's generator to files, and prints their sizes and speeds.

    Args:
        args: The command's arguments after ``export``.

    Returns:
        The paths of the files. An invalid argument ends the process with an error message.
    """
    formats = get_args(Format)
    parser = OneLineParser(prog="lightning-ddst export", description="Writes a run's generator as files of its own.")
    parser.add_argument(
        "checkpoint", type=Path, metavar="CKPT", help="checkpoint, such as lightning_logs/version_0/.../last.ckpt"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="the run's config.yaml (default: in CKPT's folder or above)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where files go (default: export, next to config.yaml)"
    )
    parser.add_argument("--formats", nargs="+", choices=formats, default=["dense", "compressed"], help="kinds of files")
    parser.add_argument(
        "--weights", choices=get_args(exports.Weights), default="average", help="averaged, or the generator's own"
    )
    parser.add_argument(
        "--generator", metavar="NAME", help="its name in the module (default: the usual names are tried)"
    )
    parser.add_argument(
        "--generator_output",
        metavar="NAME",
        help="place of the images in what it returns, such as image or 0, for onnx and program (default: the only "
        "tensor)",
    )
    given = parser.parse_args(list(args))
    try:
        if reason := why_no_checkpoint(given.checkpoint):
            raise FileNotFoundError(f"CKPT={given.checkpoint}: {reason}.")
        if given.config is not None and not given.config.is_file():
            raise FileNotFoundError(f"--config={given.config}: no such file.")
        config = given.config or _config_of(given.checkpoint)
        content = _read(config)
        if given.generator is None and (parts := _parts(content)):
            raise ValueError(
                f"the run's generator has several parts, {', '.join(parts)}: export one after the other, with "
                f"--generator {parts[0]} and so on."
            )
        module = _module_of(config, content)
        generator = find_network(module, "generator", given.generator)
        exports.load_generator(generator, given.checkpoint, given.generator, given.weights)
        folder: Path = given.output or config.parent / "export"
        inputs = _example(module, needed=bool({"onnx", "program"} & {*given.formats}))
        small, found = _smaller(generator, inputs)
        output: str | None = given.generator_output
        if {"onnx", "program"} & {*given.formats}:
            Computation(small, inputs, output)  # before anything is written
        writers: dict[str, tuple[str, Callable[[Path], object]]] = {
            "dense": ("generator.safetensors", lambda path: exports.save_dense(generator, path)),
            "compressed": ("generator.compressed.safetensors", lambda path: exports.save_compressed(generator, path)),
            "onnx": ("generator.onnx", lambda path: exports.save_onnx(small, path, *inputs, output=output)),
            "program": ("generator.pt2", lambda path: exports.save_program(small, path, *inputs, output=output)),
        }
        paths = []
        dense = sum(value.numel() * value.element_size() for value in generator.state_dict().values())
        for form in given.formats:
            name, write = writers[form]
            write(folder / name)
            paths.append(folder / name)
            size = paths[-1].stat().st_size
            print(f"{paths[-1]}  {size / 1e6:.3f} MB, {size / dense:.1%} of the dense weights")
            if form == "onnx":
                ratio = onnx_time_ratio(paths[-1], small, *inputs)
                found.append(f"onnxruntime takes {ratio:.2f} of torch's time for it")
        print("\n".join([*found, _linears(small, inputs)]))
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))
    return paths


def _example(module: LightningModule, *, needed: bool) -> tuple[Any, ...]:
    """Returns example arguments of the generator; empty if they are unknown and not needed."""
    try:
        return get_generator_inputs(module, _BATCH)
    except ValueError:
        if needed:
            raise
        return ()


def _smaller(generator: nn.Module, inputs: Sequence[Any]) -> tuple[nn.Module, list[str]]:
    """Returns the generator without channels that no weight reads, and a text about the gain."""
    if not inputs:
        return generator, ["nothing was measured: the arguments of the generator are unknown"]
    try:
        small, left, channels = compact(generator, *inputs)
    except ValueError as error:
        return generator, [f"no channel could be removed: {error}"]
    if left == channels:
        return generator, [
            f"no channel could be removed: all {channels} are in use. For a smaller network, train with "
            'granularity="channel"'
        ]
    with eval_mode(generator):
        ratio = time_ratio(lambda: small(*inputs), lambda: generator(*inputs))
    gain = f"at {_BATCH} images it takes {ratio:.2f} of the time"
    return small, [f"in onnx and program files its layers are smaller, {left} of {channels} channels: {gain}"]


def _linears(generator: nn.Module, inputs: Sequence[Any]) -> str:
    """Returns a text about Linear layers that run faster as sparse tensors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        ratios = sparse_linears(copy_network(generator), *inputs) if inputs else {}
    faster = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items() if ratio < WORTHWHILE)
    if not faster:
        return "nothing else is faster: dense kernels multiply zeros, and no Linear layer gains as a sparse tensor"
    how = f"as sparse tensors (lightning_ddst.export.benchmark.sparse_linears), at {_BATCH} images, these Linear layers"
    return f"{how} take this share of their dense time: {faster}"


def _config_of(checkpoint: Path) -> Path:
    """Returns the path of the ``config.yaml`` that ``lightning-ddst fit`` wrote."""
    candidates = [folder / "config.yaml" for folder in (checkpoint.parent, checkpoint.parent.parent)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    places = " or ".join(str(folder) for folder in (checkpoint.parent, checkpoint.parent.parent))
    raise FileNotFoundError(
        f"there is no config.yaml in {places}: name the run's with --config. A run that was started in Python has "
        "none; export its generator in Python, with lightning_ddst.export.load_generator."
    )


def _read(config: Path) -> dict[str, Any]:
    """Reads the configuration of a run."""
    try:
        content = read_yaml(config)
    except ValueError as error:
        raise ValueError(f"{config} is not the configuration of a run: {error}") from error
    if not isinstance(content, dict) or "model" not in content:
        raise ValueError(f"{config} is not the configuration of a run: it has no model.")
    return content


def _parts(content: Mapping[str, Any]) -> list[str]:
    """Returns the names of a generator's parts in a configuration, of `--sparsity.generator` or a callback's."""
    callbacks = (content.get("trainer") or {}).get("callbacks") or []
    arguments = [content.get("sparsity"), *(c.get("init_args") for c in callbacks if isinstance(c, dict))]
    given = [each["generator"] for each in arguments if isinstance(each, dict) and each.get("generator")]
    return next((list(map(str, names)) for names in given if isinstance(names, list)), [])


def _module_of(config: Path, content: Mapping[str, Any]) -> LightningModule:
    """Makes the module that a configuration describes, with new weights and without optimizers."""
    check_classes(content["model"], "model")
    parser = ArgumentParser(exit_on_error=False)
    import pytorch_lightning  # imported here: it takes a second

    parser.add_subclass_arguments((LightningModule, pytorch_lightning.LightningModule), "model")
    try:
        parsed = parser.parse_object({"model": without_optimizers(content["model"])})
    except ArgumentError as error:
        raise ValueError(f"{config} describes no module: {explain(str(error), [])}") from error
    check_classes(parsed.as_dict())  # in which names without a module are complete
    model: LightningModule = parser.instantiate_classes(parsed).model
    return model
