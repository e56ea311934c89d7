"""The command's arguments before the parser sees them: names, places and contents of configurations."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lightning_ddst.utils.command_line import fail
from lightning_ddst.utils.configurations import check_classes, option_values, read_yaml
from lightning_ddst.utils.suggestions import did_you_mean

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "digits.yaml"
"""The default configuration: DDST on handwritten digits."""
CONFIGS = {path.stem: path for path in sorted(DEFAULT_CONFIG.parent.rglob("*.yaml"))}
"""The package's configurations by name; ``--config`` accepts these names and paths of files."""


def prepare_arguments(args: Sequence[str], run: bool) -> list[str]:
    """Returns arguments that the parser can take: paths of configurations, which come first.

    An unknown configuration, or one that the parser must not read, ends the process with an error message.

    Args:
        args: The command's arguments.
        run: Whether `args` begin with a subcommand.
    """
    prepared = _with_configs_first(_with_log_folder(_with_paths(args)), run)
    _check_configs(prepared)
    return prepared


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
                    content = read_yaml(path)
                    if not isinstance(content, dict | None):
                        raise ValueError("it must hold arguments by name, such as sparsity: {generator_density: 0.1}.")
                    check_classes(content)
                except ValueError as error:
                    fail(f"{path}: {error}")


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
    if config in CONFIGS and not Path(config).is_file():
        return str(CONFIGS[config])
    if not Path(config).is_file() and "://" not in config:
        if Path(config).suffix:
            fail(f"--config={config}: no such file.")
        names = ", ".join(CONFIGS)
        fail(f"--config={config} is neither a file nor one of {names}.{did_you_mean(config, CONFIGS)}")
    return config


def _with_configs_first(args: Sequence[str], run: bool) -> list[str]:
    """Moves the configurations of a subcommand before its other arguments, which override them wherever they are.

    If there are none, the default configuration comes first.
    """
    subcommands = ("fit", "validate", "test", "predict")
    place = next((i + 1 for i, arg in enumerate(args) if arg in subcommands), None) if run else 0
    if place is None:
        return list(args)
    configs: list[str] = []
    others: list[str] = []
    waiting = False  # for the value of --config
    for arg in args[place:]:
        is_config = waiting or _is_config(arg)
        (configs if is_config else others).append(arg)
        waiting = not waiting and arg in ("--config", "-c")
    if not configs and not any(map(_is_config, args[:place])):
        configs = ["--config", str(DEFAULT_CONFIG)]
    return [*args[:place], *configs, *others]


def _is_config(arg: str) -> bool:
    return arg == "--config" or arg.startswith(("--config=", "-c"))
