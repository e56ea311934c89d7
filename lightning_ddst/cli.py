"""The command ``lightning-ddst``: a LightningCLI with the arguments of sparse training under ``--sparsity``."""

import os
import pickle
import pydoc
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_ddst.attached.options import METHOD_ARGUMENTS
from lightning_ddst.callbacks import DynamicSparsityCallback, InterruptCheckpoint, SampleQuality
from lightning_ddst.data.network_sizes import NetworkSizes, fit_networks
from lightning_ddst.export.command import export
from lightning_ddst.gan.module import GANModule
from lightning_ddst.methods.base import METHODS, unused_arguments
from lightning_ddst.report.compare_command import compare
from lightning_ddst.report.plot_command import plot
from lightning_ddst.report.sweep_command import sweep
from lightning_ddst.utils.checkpoints import AtomicCheckpointIO, CheckpointError, describe_error
from lightning_ddst.utils.configurations import check_classes, option_values, read_yaml
from lightning_ddst.utils.states import StateError

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digits.yaml"
"""The default configuration: DDST on handwritten digits."""
CONFIGS = {path.stem: path for path in sorted(DEFAULT_CONFIG.parent.rglob("*.yaml"))}
"""The package's configurations by name; ``--config`` accepts these names and paths of files."""
SUBCOMMANDS: dict[str, Callable[[Sequence[str]], object]] = {
    "plot": plot,
    "compare": compare,
    "sweep": sweep,
    "export": export,
}
"""Subcommands next to LightningCLI's: functions of the arguments after the subcommand's name."""


class SparseGANCLI(LightningCLI):
    """A LightningCLI with the arguments of `DynamicSparsityCallback` under ``sparsity``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callback to every configuration."""
        parser.add_lightning_class_args(DynamicSparsityCallback, "sparsity")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the arguments; also keeps those that were given, without defaults."""
        super().parse_arguments(parser, args)
        self._given = parser.parse_args(args, defaults=False)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds a checkpoint for interrupted runs to the Trainer's callbacks, and has checkpoints written atomically."""
        trainer: Trainer = super().instantiate_trainer(**kwargs)
        with suppress(NotImplementedError):  # ModelParallelStrategy has no checkpoint_io
            if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not one that the user chose
                trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.callbacks.append(InterruptCheckpoint())  # type: ignore[attr-defined]
        return trainer

    def instantiate_classes(self) -> None:
        """Makes all objects; an invalid value ends the process with an error message, without a traceback."""
        given = self.config
        try:
            check_classes((given[self.subcommand] if self.subcommand else given).as_dict())
            self.config = _without_unused(given, self.subcommand)  # config.yaml records this
            sizes = self._fit_networks()
            super().instantiate_classes()
            sizes.check()  # now: the networks' own errors come first
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, SampleQuality):
                    callback.check_data(self.datamodule)
        except (ValueError, OSError) as error:
            print(f"lightning-ddst: error: {_first_reason(error)}", file=sys.stderr)
            sys.exit(2)
        finally:
            self.config = given

    def _fit_networks(self) -> NetworkSizes:
        """Gives a `GANModule`'s networks the size of the data's images, where no other was given."""
        config, given = ((each[self.subcommand] if self.subcommand else each) for each in (self.config, self._given))
        model = pydoc.locate(config.model.class_path) if config.get("model") else None
        if not (config.get("data") and isinstance(model, type) and issubclass(model, GANModule)):
            return NetworkSizes({}, [])
        sizes = fit_networks(config, given)
        if sizes.filled:
            values = ", ".join(f"{name}={size}" for name, size in sizes.filled.items())
            rank_zero_info(f"The networks fit the data's images: {values}")
        return sizes


def _without_unused(config: Namespace, subcommand: str | None) -> Namespace:
    """Removes arguments of other methods, which layered configurations may contain, with one warning."""
    config = config.clone()
    sparsity = (config[subcommand] if subcommand else config).sparsity
    method = sparsity.method
    unused = unused_arguments(method, [name for name in METHOD_ARGUMENTS if sparsity[name] is not None])
    if not unused or (isinstance(method, str) and method not in METHODS):
        return config
    values = ", ".join(f"{name}={sparsity[name]!r}" for name in unused)
    name = method if isinstance(method, str) else method.class_path
    rank_zero_warn(f"--sparsity: method={name} does not take {values}, which is left out.")
    for argument in unused:
        sparsity[argument] = None
    return config


def main() -> None:
    """Runs the command with the arguments of the process."""
    # `args` are those of the process, with names of configurations replaced by paths.
    warnings.filterwarnings("ignore", ".*LightningCLI's args parameter")
    sys.path.append(os.getcwd())  # for the user's own classes
    if (subcommand := SUBCOMMANDS.get("".join(sys.argv[1:2]))) is not None:
        subcommand(sys.argv[2:])
    else:
        try:
            make_cli(sys.argv[1:])
        except (CheckpointError, StateError, pickle.UnpicklingError) as error:
            # LightningCLI itself reads the checkpoint's hyperparameters, with weights_only=True.
            said = f"--ckpt_path: {describe_error(error)}." if isinstance(error, pickle.UnpicklingError) else error
            print(f"lightning-ddst: error: {said}", file=sys.stderr)
            sys.exit(1)


def make_cli(args: Sequence[str], run: bool = True) -> SparseGANCLI:
    """Runs the command with given arguments.

    Args:
        args: The command's arguments.
        run: Whether to run the subcommand at the beginning of `args`. If False, `args` are those of ``fit``, and the
            objects are only made: the attributes ``trainer``, ``model`` and ``datamodule`` of the result.
    """
    args = _with_default_config(_with_log_folder(_with_paths(args)), run)
    _check_configs(args)
    return SparseGANCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "epilog": "Others: lightning-ddst plot RUN draws what a run logged, compare RUN... compares several, "
            "sweep --densities D,D,... runs and compares several densities, export CKPT writes a generator.",
            "version": version("lightning-ddst"),
        },
        seed_everything_default=0,
        args=args,
        run=run,
    )


def _first_reason(error: ValueError | OSError) -> ValueError | OSError:
    """Returns the first error in a chain: the parser wraps errors of constructors."""
    reason, cause = error, error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, ValueError | OSError):
            reason = cause
        cause = cause.__cause__ or cause.__context__
    return reason


def _check_configs(args: Sequence[str]) -> None:
    """Ends the process if a configuration file is no YAML, or names a function where a class must be.

    The parser, which runs later, would call the function, and expand aliases for ever.
    """
    for place, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        if option in ("--config", "-c"):
            path = Path(value if equals else "".join(args[place + 1 : place + 2]))
            with suppress(OSError):  # which the parser reports
                try:
                    check_classes(read_yaml(path))
                except ValueError as error:
                    print(f"lightning-ddst: error: {path}: {error}", file=sys.stderr)
                    sys.exit(2)


def _with_paths(args: Sequence[str]) -> list[str]:
    """Replaces names of the package's configurations by their paths."""
    resolved = list(args)
    for place, arg in enumerate(resolved):
        option, equals, value = arg.partition("=")
        if option in ("--config", "-c") and equals:
            resolved[place] = f"{option}={_path(value)}"
        elif place and resolved[place - 1] in ("--config", "-c"):
            resolved[place] = _path(arg)
    return resolved


def _with_log_folder(args: Sequence[str]) -> list[str]:
    """Gives a logger that is named without the folder it requires the run's root folder."""
    given = dict(option_values(args))
    logger = given.get("--trainer.logger", "").rpartition(".")[2]
    folders = ("--trainer.logger.save_dir", "--trainer.logger.init_args.save_dir")
    if logger not in ("CSVLogger", "TensorBoardLogger") or any(folder in given for folder in folders):
        return list(args)
    return [*args, f"{folders[1]}={given.get('--trainer.default_root_dir', '.')}"]


def _path(config: str) -> str:
    if Path(config).suffix or Path(config).is_file():
        return config
    if config not in CONFIGS:
        names = ", ".join(CONFIGS)
        print(f"lightning-ddst: error: --config {config} is neither a file nor one of {names}.", file=sys.stderr)
        sys.exit(2)
    return str(CONFIGS[config])


def _with_default_config(args: Sequence[str], run: bool) -> list[str]:
    """Inserts the default configuration first, so that later arguments can override it."""
    if any(arg == "--config" or arg.startswith(("--config=", "-c")) for arg in args):
        return list(args)
    if not run:
        return ["--config", str(DEFAULT_CONFIG), *args]
    subcommands = ("fit", "validate", "test", "predict")
    place = next((i + 1 for i, arg in enumerate(args) if arg in subcommands), None)
    return list(args) if place is None else [*args[:place], "--config", str(DEFAULT_CONFIG), *args[place:]]
