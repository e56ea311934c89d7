"""Parsers of the command: errors in one line, and help without what is rarely needed."""

import dis
import sys
from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_ddst.utils.parser_errors import explain, in_one_line, shorten

DEBUG = "--debug"
"""The argument of all subcommands with which errors also print their traceback."""
_PACKAGE = Path(__file__).parent.parent


def fail(*errors: object, status: int = 2) -> NoReturn:
    """Ends the process with a line for each error.

    Args:
        *errors: The errors, or texts.
        status: The exit status: 2 for wrong arguments, 1 for what happens later.

    Raises:
        SystemExit: Always.
    """
    for error in errors:
        print(f"lightning-ddst: error: {in_one_line(error)}", file=sys.stderr)
    raise SystemExit(status)


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of descriptions and epilogs, and leaves out arguments that are rarely needed.

    Attributes:
        hidden_prefix: Beginning of the options that are left out.
        shown: Those that are shown all the same.
    """

    hidden_prefix: ClassVar[str] = "--trainer."
    shown: ClassVar[frozenset[str]] = frozenset(
        f"--trainer.{name}"
        for name in (
            *("accelerator", "devices", "strategy", "precision", "max_epochs", "max_steps", "max_time"),
            *("callbacks", "logger", "default_root_dir", "log_every_n_steps", "help"),
        )
    )

    def add_argument(self, action: Action) -> None:
        """Adds an argument to the help, unless it is one to leave out."""
        names = action.option_strings
        if self.shown.intersection(names) or not any(name.startswith(self.hidden_prefix) for name in names):
            super().add_argument(action)


class OneLineParser(ArgumentParser):
    """A parser whose errors are one line, and end the process with status 2.

    Options must be written in full: an abbreviation would accept misspelled names.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings: dict[str, Any] = {"formatter_class": HelpFormatter, "allow_abbrev": False}
        super().__init__(*args, **settings | kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the process with a line for an error.

        Raises:
            SystemExit: Always, except in a parser of a class's arguments, whose error the outer parser reports.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        fail(explain(message, parser.argument_names()))

    def argument_names(self) -> Iterable[str]:
        """Returns the dotted names of the arguments."""
        return [*self.get_defaults().keys(), "help", "print_config"]


def describe_expected(error: BaseException) -> str | None:
    """Returns the text of an error about the user's input, which needs no traceback; None for any other error.

    These are errors that a ``raise`` statement of this package raised, and those that Lightning and torch raise for
    settings and weights that do not fit.
    """
    if isinstance(error, MisconfigurationException):
        return str(error)
    if not isinstance(error, ValueError | RuntimeError | TypeError | OSError) or error.__traceback__ is None:
        return None
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    if code.co_name == "load_state_dict" and str(error).startswith("Error(s) in loading state_dict"):
        return f"the checkpoint does not fit the model: {shorten(in_one_line(error), 300)}"
    raised = code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return str(error) if raised and _PACKAGE in Path(code.co_filename).parents else None
