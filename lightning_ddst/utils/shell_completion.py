"""Scripts with which a shell completes the command's subcommands and options."""

from argparse import Action, ArgumentParser
from collections.abc import Iterable, Iterator

SHELLS = ("bash", "zsh")
"""Shells that a script can be written for."""
_FUNCTION = "_lightning_ddst_config_or_file"  # shtab's scripts take the results of functions named "file" as paths
_FILES = ("ckpt_path", "config", "output", "folder", "plot")


def completion_script(parser: ArgumentParser, shell: str, configurations: Iterable[str]) -> str:
    """Writes a completion script.

    The script completes subcommands, options and choices, and paths where files are expected. Arguments of classes that
    are chosen on the command line (``--model.NAME``, ``--data.NAME``) are not completed: each class has others.

    Args:
        parser: The command's parser. Its actions get shtab's attribute ``complete``.
        shell: One of `SHELLS`.
        configurations: Names that complete ``--config``, next to paths.

    Raises:
        ImportError: If shtab is missing: install ``lightning-ddst[completion]``.
    """
    try:
        import shtab
    except ImportError as error:
        raise ImportError(f"{error}: for completion install lightning-ddst[completion].") from error
    names = " ".join(configurations)
    preamble = {
        "bash": f'{_FUNCTION}() {{\n  compgen -W "{names}" -- "$1"\n  compgen -f -- "$1"\n}}',
        "zsh": f"{_FUNCTION}() {{\n  compadd {names}\n  _files\n}}",
    }
    for action in _actions(parser):
        if {"-c", "--config"} <= {*action.option_strings}:  # `export --config` takes a run's config.yaml instead
            action.complete = dict.fromkeys(SHELLS, _FUNCTION)  # type: ignore[attr-defined]
        elif action.dest in _FILES or not (action.option_strings or action.choices):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell, preamble=preamble[shell]))


def _actions(parser: ArgumentParser) -> Iterator[Action]:
    """Yields the actions of a parser and of its subcommands; argparse has no public list of them, shtab uses this."""
    for action in parser._actions:
        yield action
        if isinstance(action.choices, dict):
            for subparser in action.choices.values():
                yield from _actions(subparser)
