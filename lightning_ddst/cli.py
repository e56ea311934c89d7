"""The command ``lightning-ddst``: a LightningCLI with the arguments of sparse training under ``--sparsity``."""

import os
import pickle
import pydoc
import re
import sys
import traceback
import warnings
from argparse import SUPPRESS, Action
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from textwrap import fill
from typing import Any, NoReturn

from jsonargparse import Namespace, capture_parser
from lightning.fabric.utilities.exceptions import MisconfigurationException
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
from lightning_ddst.utils.cache import check_writable
from lightning_ddst.utils.checkpoints import AtomicCheckpointIO, describe_error, why_no_checkpoint
from lightning_ddst.utils.command_line import DEBUG, OneLineParser, describe_expected, fail
from lightning_ddst.utils.config_arguments import CONFIGS, prepare_arguments
from lightning_ddst.utils.configurations import check_classes, find_missing_files
from lightning_ddst.utils.parser_errors import explain
from lightning_ddst.utils.run_folders import NewRunFolders
from lightning_ddst.utils.shell_completion import SHELLS, completion_script


def completion(args: Sequence[str]) -> None:
    """Prints a script with which a shell completes the command.

    Args:
        args: The command's arguments after ``completion``. An invalid one ends the process with an error message.
    """
    parser = OneLineParser(
        prog="lightning-ddst completion",
        description="Prints a script that completes the command's arguments in a shell.",
        epilog='For this shell: eval "$(lightning-ddst completion bash)"',
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    shell = parser.parse_args(list(args)).shell
    try:
        print(completion_script(capture_parser(make_cli, ["fit"]), shell, CONFIGS))
    except ImportError as error:
        parser.error(str(error))


SUBCOMMANDS: dict[str, Callable[[Sequence[str]], object]] = {
    "plot": plot,
    "compare": compare,
    "sweep": sweep,
    "export": export,
    "completion": completion,
}
"""Subcommands next to LightningCLI's: functions of the arguments after the subcommand's name."""

_CHECKPOINTS = ("best", "last", "hpc", "registry")
"""Values of ``--ckpt_path``, or their beginnings before a colon, that Lightning replaces by a path."""
_ERRORS = (ValueError, OSError, ImportError, MisconfigurationException)
"""Errors of constructors that are about their arguments, or about a missing package."""
_DESCRIPTION = "Sparse training of GANs with Double Dynamic Sparse Training (DDST)."
_WIDTH = 80
"""Columns of the help's own texts."""
_EXAMPLES = """\
Examples:
  The default experiment, on handwritten digits, and with other settings:
    lightning-ddst fit
    lightning-ddst fit --sparsity.generator_density 0.05 --trainer.max_epochs 10
  All arguments as a file, to change; a file, and arguments that override it:
    lightning-ddst fit --print_config > my.yaml
    lightning-ddst fit --config my.yaml --sparsity.method static
  Configurations of this package; another class, and its arguments:
    lightning-ddst fit --config paper --config cifar10_sngan --config dda
    lightning-ddst fit --data CIFAR10DataModule --data.root data
  A checkpoint:
    lightning-ddst validate --ckpt_path lightning_logs/version_0/checkpoints/last.ckpt
"""


class _TrainerHelp(Action):
    """Prints all arguments of the Trainer."""

    def __init__(self, option_strings: Sequence[str], dest: str = SUPPRESS, **others: Any) -> None:
        text = "Show all arguments of the Trainer and exit."
        super().__init__(option_strings, dest=SUPPRESS, default=SUPPRESS, nargs=0, help=text)

    def __call__(self, parser: Any, *_: Any) -> None:
        every = LightningArgumentParser(prog=parser.prog, usage="%(prog)s [--trainer.NAME VALUE]", description="")
        every.add_lightning_class_args(Trainer, "trainer")
        every.print_help()
        parser.exit()


class SparseGANParser(OneLineParser, LightningArgumentParser):
    """The parser of the command and of its subcommands for training."""

    subcommands: Any
    """The result of `add_subcommands`."""

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        """Adds subcommands."""
        self.subcommands = super().add_subcommands(*args, **kwargs)
        add = self.subcommands.add_subcommand
        # LightningCLI's texts end within a sentence.
        self.subcommands.add_subcommand = lambda name, parser, help="": add(name, parser, help=help.partition(".")[0])
        return self.subcommands

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the process with a line for an error; a configuration of a method alone lacks model and data."""
        missing = re.match(r"the following arguments are required: .*\b(data|model)$", message)
        if self.exit_on_error and missing:
            fail(f"{explain(message, [])} Configurations of a method come after another one, such as --config digits.")
        super().error(message, ex)

    def instantiate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> Namespace:
        """Makes the Trainer's callbacks last: they may take long, and errors of other arguments appear before."""
        callbacks = namespace.get("trainer.callbacks")
        if callbacks is None:
            made: Namespace = super().instantiate(namespace, *args, **kwargs)
            return made
        others = namespace.clone()
        others["trainer.callbacks"] = None
        made = super().instantiate(others, *args, **kwargs)
        alone = Namespace({"trainer.callbacks": callbacks})  # type: ignore[no-untyped-call]
        made.update(super().instantiate(alone, instantiate_groups=False))
        return made


class SparseGANCLI(LightningCLI):
    """A LightningCLI with the arguments of `DynamicSparsityCallback` under ``sparsity``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._new_folders: NewRunFolders | None = None
        try:
            super().__init__(*args, **kwargs)
        except Exception:
            if self._new_folders is not None:
                if not self.trainer.fit_loop.epoch_loop.batch_progress.total.ready:
                    self._new_folders.remove_untrained()
                if self.trainer.progress_bar_callback is not None:
                    print(file=sys.stderr)  # the error begins on a line of its own
            raise

    def before_fit(self) -> None:
        """Checks that logs can be written, and notes which log folders are new.

        New folders are removed if the run ends with an error before its first batch.

        Raises:
            OSError: If a folder cannot be written to.
        """
        if not self.trainer.is_global_zero:
            return
        self._new_folders = NewRunFolders(self.trainer.loggers)
        folders = [getattr(logger, "log_dir", None) for logger in self.trainer.loggers]
        # Folders of single runs are left to the loggers, which number them by those that exist.
        parents = [os.path.dirname(folder) for folder in folders if isinstance(folder, str)]
        for folder in parents or [self.trainer.default_root_dir]:  # which gets config.yaml
            if "://" not in folder:
                try:
                    check_writable(Path(folder))
                except OSError as error:
                    reason = f"the run cannot write to {folder}: {error.strerror}"
                    raise OSError(f"{reason}. Choose another folder, --trainer.default_root_dir.") from error

    def setup_parser(self, add_subcommands: bool, *args: Any, **kwargs: Any) -> None:
        """Adds the parsers of other subcommands, for the help."""
        super().setup_parser(add_subcommands, *args, **kwargs)
        if add_subcommands:
            for name, command in SUBCOMMANDS.items():
                parser = capture_parser(command, [])
                self.parser.subcommands.add_subcommand(  # type: ignore[attr-defined]
                    name, parser, help=parser.description
                )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callback to every configuration, before all other arguments."""
        parser.add_lightning_class_args(DynamicSparsityCallback, "sparsity")
        parser.add_argument("--trainer.help", action=_TrainerHelp)
        super().add_default_arguments_to_parser(parser)

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
        _check(given[self.subcommand] if self.subcommand else given)
        try:
            self.config = _without_unused(given, self.subcommand)  # config.yaml records this
            sizes = self._fit_networks()
            super().instantiate_classes()
            sizes.check()  # now: the networks' own errors come first
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, SampleQuality):
                    callback.check_data(self.datamodule)
        except _ERRORS as error:
            fail(_first_reason(error))
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


def _check(config: Namespace) -> None:
    """Ends the process for names of classes that are not allowed, and for missing files, before anything is made."""
    try:
        check_classes(config.as_dict())
    except ValueError as error:
        fail(error)
    missing = [f"{option}: {reason}" for option, reason in find_missing_files(config.as_dict())]
    checkpoint = str(config.get("ckpt_path") or "last")
    if checkpoint.partition(":")[0] not in _CHECKPOINTS and (reason := why_no_checkpoint(checkpoint)):
        missing.append(f"--ckpt_path={checkpoint}: {reason}.")
    if missing:
        fail(*missing)


def _without_unused(config: Namespace, subcommand: str | None) -> Namespace:
    """Removes arguments of other methods, which layered configurations may contain, with one warning."""
    config = config.clone()
    sparsity = (config[subcommand] if subcommand else config).sparsity
    if not isinstance(sparsity, Namespace):  # an empty key of YAML
        raise ValueError(f"--sparsity={sparsity} must hold arguments by name, such as generator_density: 0.1.")
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
    """Runs the command with the arguments of the process.

    An error about arguments, configurations or files is one line. With ``--debug`` its traceback is printed as well.
    """
    debug = DEBUG in sys.argv
    try:
        _run([argument for argument in sys.argv[1:] if argument != DEBUG])
    except SystemExit as end:
        if debug and end.code not in (None, 0):
            traceback.print_exception(end)
        raise
    except KeyboardInterrupt:  # before or after training, which Lightning ends itself
        if debug:
            raise
        fail("interrupted.", status=130)
    except Exception as error:
        text = describe_expected(error)
        if debug or text is None:
            raise
        fail(text, status=1)


def _run(args: Sequence[str]) -> None:
    # `args` are those of the process, with names of configurations replaced by paths.
    warnings.filterwarnings("ignore", ".*LightningCLI's args parameter")
    sys.path.append(os.getcwd())  # for the user's own classes
    if (subcommand := SUBCOMMANDS.get("".join(args[:1]))) is not None:
        subcommand(args[1:])
        return
    try:
        make_cli(args)
    except pickle.UnpicklingError as error:
        # LightningCLI itself reads the checkpoint's hyperparameters, with weights_only=True.
        fail(
            f"--ckpt_path: it is damaged, or holds other objects than tensors and containers: {describe_error(error)}.",
            status=1,
        )


def make_cli(args: Sequence[str], run: bool = True) -> SparseGANCLI:
    """Runs the command with given arguments.

    Args:
        args: The command's arguments.
        run: Whether to run the subcommand at the beginning of `args`. If False, `args` are those of ``fit``, and the
            objects are only made: the attributes ``trainer``, ``model`` and ``datamodule`` of the result.
    """
    args = prepare_arguments(args, run)
    epilog = _epilog()
    return SparseGANCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        parser_class=SparseGANParser,
        parser_kwargs={
            "prog": "lightning-ddst",
            "description": _DESCRIPTION,
            "epilog": epilog,
            "version": version("lightning-ddst"),
        }
        | {name: {"usage": _usage(name), "epilog": epilog} for name in LightningCLI.subcommands()},
        seed_everything_default=0,
        args=args,
        run=run,
    )


def _first_reason(error: BaseException) -> BaseException:
    """Returns the first error in a chain: the parser wraps errors of constructors."""
    reason, cause = error, error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, _ERRORS):
            reason = cause
        cause = cause.__cause__ or cause.__context__
    return reason


def _usage(subcommand: str) -> str:
    return (
        f"lightning-ddst {subcommand} [--config NAME_OR_FILE] [--ckpt_path CKPT]\n"
        "       [--sparsity.NAME VALUE] [--model CLASS] [--model.NAME VALUE]\n"
        "       [--data CLASS] [--data.NAME VALUE] [--trainer.NAME VALUE]"
    )


def _epilog() -> str:
    """Lists examples and the package's configurations, each with the first sentence of its first comment."""
    names = "\n".join(
        fill(f"  {name:<22}{_first_comment(path)}", _WIDTH, subsequent_indent=" " * 24, break_on_hyphens=False)
        for name, path in CONFIGS.items()
    )
    return (
        f"{_EXAMPLES}\nConfigurations for --config, which can be given several times; later ones\noverride earlier "
        f"ones:\n{names}\n\n{DEBUG} prints the traceback of an error as well."
    )


def _first_comment(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip().partition(". ")[0].rstrip(".:")
