"""Checks of configurations before their classes are instantiated: jsonargparse also calls functions that they name."""

import inspect
import math
import pydoc
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_MOST_VALUES = 100_000
"""Values that a configuration may hold when its aliases are expanded."""


def read_yaml(path: Path) -> Any:
    """Reads a configuration file.

    Args:
        path: Path of the file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not text in UTF-8, not YAML, or its aliases stand for very many values or themselves.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        values = _count_values(content, {})
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"it is not a YAML file: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply.") from error
    if values > _MOST_VALUES:
        raise ValueError(f"it holds more than {_MOST_VALUES:,} values.")
    return content


def _count_values(value: Any, known: dict[int, float]) -> float:
    """Counts values with each alias expanded; infinite if one stands for a part of itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count_values(part, known) for part in parts)
    return known[id(value)]


def option_values(args: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the options among a command's arguments with their values, which follow or are joined by "=".

    Args:
        args: The arguments; those that are no options come with the next argument, too.
    """
    following = [*args[1:], ""]
    pairs = zip(args, following, strict=False)
    return [(arg, value) if "=" not in arg else (arg.partition("=")[0], arg.partition("=")[2]) for arg, value in pairs]


def check_classes(config: Any, name: str = "") -> None:
    """Checks every ``class_path`` of a configuration.

    Each must name a class, or a function that is annotated to return one; an optimizer's must name a subclass of
    `torch.optim.Optimizer`. Names that cannot be imported are left to the parser.

    Args:
        config: The configuration, or a part of it; dicts and lists.
        name: Its dotted name, for the error.

    Raises:
        ValueError: For a class path that is not allowed.
    """
    for argument, returned in _callables(config).items():
        if Optimizer in returned:
            _check_optimizer(f"{name}.init_args.{argument}".removeprefix("."), config["init_args"].get(argument))
    for key, value in _items(config):
        if key == "class_path":
            _check_made(name, value)
        check_classes(value, f"{name}.{key}".removeprefix("."))


def find_missing_files(config: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Finds every file that the classes of a configuration would read, and that is not there.

    A class that reads files may have a class method `missing_files`. It takes the class's arguments as a mapping, and
    returns pairs of an argument's name and a sentence about the file that is missing.

    Args:
        config: The configuration with all defaults, or a part of it; dicts and lists.
        name: Its dotted name.

    Yields:
        The argument with its value, as on the command line where that can set it, and the sentence.
    """
    if isinstance(config, Mapping) and isinstance(config.get("class_path"), str):
        arguments = config.get("init_args") or {}
        find = getattr(_located(config["class_path"]), "missing_files", None)
        for argument, reason in find(arguments) if callable(find) else ():
            dashes = "" if "[" in name else "--"
            yield f"{dashes}{name}.{argument}={arguments.get(argument)}", reason
        yield from find_missing_files(arguments, name)
    else:
        for key, value in _items(config):
            # Options change the last entry of a list.
            of_list = not isinstance(config, Mapping)
            part = ("" if key == len(config) - 1 else f"[{key}]") if of_list else f".{key}"
            yield from find_missing_files(value, f"{name}{part}".removeprefix("."))


def without_optimizers(config: Any) -> Any:
    """Returns a copy of a configuration whose classes get no optimizers and schedulers.

    Args:
        config: The configuration, or a part of it; dicts and lists.
    """
    config = deepcopy(config)
    _remove_optimizers(config)
    return config


def no_optimizer(params: Any) -> Optimizer:
    """Takes the place of an optimizer that a module requires and never makes.

    Raises:
        RuntimeError: If it is called.
    """
    raise RuntimeError("this module was made without optimizers.")


def no_scheduler(optimizer: Optimizer) -> LRScheduler:
    """Takes the place of a learning rate scheduler that a module requires and never makes.

    Raises:
        RuntimeError: If it is called.
    """
    raise RuntimeError("this module was made without learning rate schedulers.")


def _items(config: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(config, Mapping):
        yield from config.items()
    elif isinstance(config, list | tuple):
        yield from enumerate(config)


def _remove_optimizers(config: Any) -> None:
    for argument, returned in _callables(config).items():
        for kind, placeholder in ((Optimizer, no_optimizer), (LRScheduler, no_scheduler)):
            if kind in returned:
                config["init_args"].pop(argument, None)
                if _is_required(_located(config["class_path"]), argument):
                    config["init_args"][argument] = f"{placeholder.__module__}.{placeholder.__name__}"
    for _, value in _items(config):
        _remove_optimizers(value)


def _callables(config: Any) -> dict[str, list[Any]]:
    """Returns the arguments of a configured class that take functions, with what those must return."""
    if not isinstance(config, Mapping) or not isinstance(config.get("init_args"), dict):
        return {}
    kind = _located(config.get("class_path"))
    found: dict[str, list[Any]] = {}
    for each in reversed(kind.__mro__) if isinstance(kind, type) else ():
        for argument, hint in _hints(vars(each).get("__init__")).items():
            if returned := list(_returned(hint)):
                found[argument] = returned
    return found


def _returned(hint: Any) -> Iterator[Any]:
    """The classes that the functions in a type hint return."""
    if typing.get_origin(hint) is Callable:
        returned = typing.get_args(hint)[-1]
        for each in (returned, *typing.get_args(returned)):
            if isinstance(each, type):
                yield from (kind for kind in (Optimizer, LRScheduler) if issubclass(each, kind))
    else:
        for part in typing.get_args(hint):
            yield from _returned(part)


def _hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except Exception:  # names that are imported for type checking only
        return {}


def _is_required(kind: Any, argument: str) -> bool:
    """Whether an argument of a class, or of the first parent that has it, has no default."""
    for each in kind.__mro__:
        parameters = inspect.signature(vars(each)["__init__"]).parameters if "__init__" in vars(each) else {}
        if argument in parameters:
            return parameters[argument].default is inspect.Parameter.empty
    return False


def _located(path: Any) -> Any:
    """Imports an object by its dotted path; None if that is impossible."""
    try:
        return pydoc.locate(path)
    except Exception:  # whatever a user's module raises; the parser reports it
        return None


def _check_made(name: str, path: Any) -> None:
    made = _located(path)
    if made is None or isinstance(made, type) or not callable(made):
        return  # not callable: rejected by the parser
    returned = _hints(made).get("return")
    if returned in (None, type(None), Any, object) or not isinstance(typing.get_origin(returned) or returned, type):
        raise ValueError(f"{name}={path!r} must be a class, or a function that is annotated to return an object.")


def _check_optimizer(name: str, value: Any) -> None:
    """Checks what is given for an optimizer: a class with arguments, or the path of a class or function."""
    path = value.get("class_path") if isinstance(value, Mapping) else value
    made = _located(path) if isinstance(path, str) else None
    kind = _hints(made).get("return") if isinstance(value, str) and not isinstance(made, type) else made
    if made is not None and not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise ValueError(f"{name}={path!r} must be a subclass of torch.optim.Optimizer, such as torch.optim.Adam.")
