"""Errors of jsonargparse in one line: the argument, its value, the allowed values and the nearest right name."""

import inspect
import pydoc
import re
import shlex
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_ddst.utils.suggestions import did_you_mean, find_nearest

_LONGEST = 80
"""Characters of a value that an error shows."""
_PLAIN_TYPES = {
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "NoneType": "null",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping",
}


def explain(message: str, names: Iterable[str]) -> str:
    """Rewrites an error of a parser in one line.

    A message of an unknown form is only joined to one line.

    Args:
        message: The message, which may have many lines.
        names: Dotted names of the parser's arguments, to suggest the nearest one.
    """
    names = list(names)
    if found := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
        return _explain_unrecognized(found[1], names)
    if found := re.match(r"argument (\S+): invalid choice: (.+?) \(choose from (.*)\)$", message):
        return _explain_choice(found[1], _unquoted(found[2]), [_unquoted(each) for each in found[3].split(", ")])
    if found := re.match(r"(?:Subcommand|Group) '([^']*)' does not accept option '([^']*)'", message):
        prefix = f"{found[1]}." if message.startswith("Group") else ""
        return _unknown_argument(prefix + found[2], "", names)
    if found := re.match(r"Option '([^']*)' is not accepted", message):
        return _unknown_argument(found[1], "", names)
    if message.startswith('expected "subcommand" to be one of'):
        return "a subcommand is missing, such as fit; --help shows all."
    if found := re.match(r"the following arguments are required: (.*)", message):
        missing = [name.rpartition(".")[2] for name in found[1].split(", ")]
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; --help shows all arguments."
    if message.startswith('Parser key "'):
        return _Problem.of(message).explain()
    return in_one_line(message)


def in_one_line(text: object) -> str:
    """Joins the lines of a text."""
    return " ".join(str(text).split())


def shorten(text: str, longest: int) -> str:
    """Cuts a text that is longer than a number of characters."""
    return text if len(text) <= longest else f"{text[:longest]}..."


def _explain_unrecognized(arguments: str, names: Sequence[str]) -> str:
    try:
        first, *others = shlex.split(arguments)
    except ValueError:  # a quote without its end
        first, *others = arguments.split()
    if not first.startswith("-"):
        return f"{first!r} is not expected here; arguments are written --name value."
    name, equals, value = first.lstrip("-").partition("=")
    if not equals and others and not others[0].startswith("-"):
        value = others[0]
    return _unknown_argument(name, value, names)


def _unknown_argument(name: str, value: str, names: Sequence[str]) -> str:
    near = _nearest_argument(name.removesuffix("+"), names)
    hint = f" Did you mean --{near}?" if near else ""
    return f"--{name}{_shown(value)} is not an argument; --help shows all.{hint}"


def _nearest_argument(name: str, names: Sequence[str]) -> str | None:
    """Returns the nearest dotted name, also if only a prefix is missing or misspelled."""
    if near := [each for each in names if each.rpartition(".")[2] == name]:
        return near[0]
    group, dot, last = name.rpartition(".")
    if longer := [each for each in names if each.startswith(group + dot) and each.endswith(f"_{last}")]:
        return longer[0]  # --density: --sparsity.generator_density
    if near_name := find_nearest(name, names):
        return near_name
    head, _, rest = name.partition(".")
    near_head = find_nearest(head, {each.partition(".")[0] for each in names})
    return f"{near_head}.{rest}" if rest and near_head not in (None, head) else None


def _explain_choice(name: str, value: str, allowed: Sequence[str]) -> str:
    shown = "" if name.startswith("subcommand") else f"{name}="
    what = "subcommand" if name.startswith("subcommand") else "value"
    if what == "subcommand":
        return f"{value!r} is not a subcommand; there are {', '.join(allowed)}.{did_you_mean(value, allowed)}"
    return f"{shown}{value} is unknown; allowed are {', '.join(allowed)}.{did_you_mean(value, allowed)}"


@dataclass
class _Problem:
    """The innermost cause of an error about a value.

    jsonargparse nests the causes: keys, classes, and a list of reasons for every alternative of a type. The first list
    of reasons that names neither a key nor a class is the innermost.
    """

    keys: list[str] = field(default_factory=list)
    kind: str = ""
    types: str = ""
    reasons: list[str] = field(default_factory=list)
    value: str | None = None

    @classmethod
    def of(cls, message: str) -> "_Problem":
        problem = cls()
        for line in message.splitlines():
            if not problem._read(line.strip()):
                break
        if problem.value is None or problem.value.startswith("NestedArg("):
            nested = re.search(r"Given value: NestedArg\(key=.*?, val=(.*)\)$", message, re.MULTILINE)
            problem.value = nested[1] if nested else None
        if problem.value is not None:
            problem.value = _unquoted(problem.value)
        return problem

    def _read(self, line: str) -> bool:
        """Reads a line; returns False after the innermost reasons."""
        entry = line.removeprefix("- ")
        if self.reasons and line.startswith("Given value type: "):
            return True
        if self.reasons and line.startswith("Given value: "):
            self.value = line.removeprefix("Given value: ").partition(". Got value: ")[0]
            return False
        if self.reasons and not line.startswith("- "):
            return False
        if found := re.match(r"Type (.*) expects a function or a callable class: (.*)", entry):
            self.types, entry = found[1], found[2]
        if found := re.match(r'Parser key "([^"]+)":? ?(.*)', entry):
            self.keys.append(found[1])
            self.types, entry = "", found[2]
        if found := re.match(r"Problem with given class_path '(.*)':", entry):
            self.kind, self.types = found[1], ""
        elif line.startswith("Subtypes: "):
            self.types = line.removeprefix("Subtypes: ").removeprefix("[").removesuffix("]")
        elif entry and not re.match(r"Expected a path but|Does not validate|Errors:|Given value", entry):
            reason, got, value = entry.partition(". Got value: ")
            self.reasons.append(reason)
            if line.startswith("- "):  # one of several alternatives; the whole value follows them
                return True
            if found := re.match(r"Namespace\(class_path='([^']*)'", value):
                self.kind = found[1]
            elif got:
                self.value = value
            return False
        return True

    def explain(self) -> str:
        name = ".".join(self.keys)
        reason = self.reasons[0] if self.reasons else "is not allowed"
        if found := re.match(r"Option '(.*)' is not accepted|unrecognized arguments: --([^= ]*)(?:[= ](.*))?", reason):
            unknown = found[1] or found[2]
            names = _arguments(self.kind)
            place = f"--{name}.{unknown}{_shown(found[3] or self.value)}"
            kind = self.kind.rpartition(".")[2]
            argument = unknown.partition(".")[0].removeprefix("init_args.")
            hint = did_you_mean(argument, names)
            allowed = f"; it has {', '.join(names)}" if names else ""
            return f"{place}: {kind} has no argument {argument!r}{allowed}.{hint}"
        if found := re.match(r"the following arguments are required: (.*)", reason):
            missing = [f"--{name}.{each}" for each in found[1].split(", ")]
            return f"{' and '.join(missing)} must be given: {self.kind.rpartition('.')[2]} needs it."
        place = f"--{name}{_shown(self.value)}"
        if found := re.match(r"Import path does not correspond to a subclass of (\w+)", reason):
            return f"{place} is not a subclass of {found[1]}."
        if re.match(r"Expected a dot import path string|No module named|module .* has no attribute", reason):
            return self._explain_class(place, reason)
        if all(each.startswith("Expected a") for each in self.reasons):
            types = list(_allowed(self.types or reason.removeprefix("Expected a ")))
            choices = [_unquoted(each) for each in types if each.startswith("'")]
            is_number = types == ["text"] and re.fullmatch(r"[-+.\d]+", self.value or "")
            hint = " YAML read it as a number: put it into quotes." if is_number else ""
            return f"{place} must be {_joined(types)}.{hint}{did_you_mean(self.value, choices)}"
        return f"{place}: {in_one_line(reason)}"

    def _explain_class(self, place: str, reason: str) -> str:
        unresolved = re.match(r"Expected a dot import path string: (.*)", reason)
        value = unresolved[1] if unresolved else self.value or self.kind
        module, dot, name = value.rpartition(".")
        if dot and (owner := _located(module)) is not None:
            names = [each for each, kind in vars(owner).items() if isinstance(kind, type) and not each.startswith("_")]
            near = find_nearest(name, names)
            hint = f" Did you mean {module}.{near}?" if near else ""
            return f"{place}: {module} has no {name}.{hint}"
        if dot:
            shown = place if value.replace(".", "").isidentifier() else f"--{'.'.join(self.keys)}"  # not an argument's
            return f"{shown}: {reason}."
        types = self.types or str(_hint(self.kind, self.keys[-1]))
        named = map(_located, dict.fromkeys(re.findall(r"[\w.]+\.\w+", types)))
        bases = [each for each in named if isinstance(each, type) and not each.__module__.startswith("collections")]
        wanted = " or ".join(base.__name__ for base in bases) or "class"
        names = sorted({kind.__name__ for base in bases for kind in _subclasses(base)})
        advice = f"write its module as well, such as my_gan.{value}."
        return f"{place.partition('=')[0]}={value} is no known {wanted}; {advice}{did_you_mean(value, names)}"


def _shown(value: str | None) -> str:
    """Returns a value with its sign of equality; nothing if there is none."""
    return f"={shorten(value, _LONGEST)}" if value else ""


def _unquoted(text: str) -> str:
    return text[1:-1] if text[:1] in ("'", '"') and text[-1:] == text[:1] and len(text) > 1 else text


def _joined(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else "something else"


def _allowed(types: str) -> Iterator[str]:
    """Yields the alternatives of a type as words."""
    for each in _split(types):
        if found := re.fullmatch(r"(?:typing\.)?Literal\[(.*)\]", each):
            yield from _split(found[1])
            continue
        name = re.sub(r"<class '(.*?)'>", r"\1", each)
        if found := re.fullmatch(r"tuple\[(.*)\]", name):
            yield f"[{', '.join(_allowed(found[1]))}]"
        elif name == "bool":
            yield from ("true", "false")
        else:
            yield _PLAIN_TYPES.get(name, re.sub(r"\b\w+\.", "", name))


def _split(texts: str) -> list[str]:
    """Splits at commas outside of brackets."""
    parts: list[str] = [""]
    depth = 0
    for sign in texts:
        depth += (sign in "[(") - (sign in "])")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts if part.strip()]


def _arguments(path: str) -> list[str]:
    """Returns the names of the arguments of a class or function, also of the parents to which it passes them on."""
    made = _located(path)
    kinds = made.__mro__ if isinstance(made, type) else ()
    functions = [vars(kind)["__init__"] for kind in kinds if "__init__" in vars(kind)] or [made]
    names: list[str] = []
    for function in functions:
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # functions of C
            break
        names += [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
        if not any(each.kind is each.VAR_KEYWORD for each in parameters):
            break
    return [name for name in dict.fromkeys(names) if name != "self"]


def _subclasses(kind: type) -> Iterator[type]:
    children: list[type] = kind.__subclasses__()
    for child in children:
        yield child
        yield from _subclasses(child)


def _hint(path: str, argument: str) -> object:
    """Returns the type of an argument of a class; None if it is unknown."""
    try:
        return typing.get_type_hints(_located(path).__init__).get(argument)
    except Exception:  # names that are imported for type checking only
        return None


def _located(path: str) -> Any:
    """Imports an object by its dotted path; None if that is impossible."""
    try:
        return pydoc.locate(path)
    except Exception:  # whatever a user's module raises
        return None
