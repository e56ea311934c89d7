"""Rules for the tests themselves."""

import ast
import re
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import Strategy
from torch import nn

import lightning_ddst

PACKAGE = Path(lightning_ddst.__file__).parent
TESTS = Path(__file__).parent
BY_NAME = ("getattr", "setattr", "delattr", "hasattr", "attrgetter", "object")
"""Functions, and last parts of methods (monkeypatch.setattr, mock.patch.object), that take an attribute's name."""


def is_private(name: str) -> bool:
    """Names such as `_repr_html_`, which a notebook calls, are protocols of others."""
    return re.fullmatch(r"_[a-zA-Z0-9]\w*(?<!_)", name) is not None


def defined(tree: ast.AST) -> set[str]:
    """Names that are defined: functions, classes, variables, fields, attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def names_of_torch_and_lightning() -> set[str]:
    objects = [
        *(Callback(), LightningModule(), nn.Linear(1, 1), nn.Parameter(torch.zeros(1))),
        *(torch.optim.Adam([torch.zeros(1)]), LightningOptimizer, Strategy, Trainer, torch.Generator()),
    ]
    return {name for each in objects for name in dir(each)}


@cache
def private_names_of_the_package() -> set[str]:
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    return {name for tree in trees for name in defined(tree) if is_private(name)} - names_of_torch_and_lightning()


def private_uses(source: str, private: Collection[str]) -> list[str]:
    """Private names of the package that a test reads, calls, replaces or imports.

    An attribute of `self` is the test's own if the file defines an attribute of this name.
    """
    tree = ast.parse(source)
    own = defined(tree)
    return [name for node in ast.walk(tree) for name in _uses(node, own, private)]


def _uses(node: ast.AST, own: set[str], private: Collection[str]) -> Iterator[str]:
    if isinstance(node, ast.Attribute) and node.attr in private:
        of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        if not (of_self and node.attr in own):
            yield node.attr
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_ddst"):
        yield from (alias.name for alias in node.names if is_private(alias.name) and alias.name != "_support")
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for argument in node.args:
            text = argument.value if isinstance(argument, ast.Constant) else None
            if isinstance(text, str) and (called in BY_NAME or text.startswith("lightning_ddst.")):
                yield from (part for part in text.split(".") if part in private)


@pytest.mark.parametrize(
    ("source", "uses"),
    [
        ("assert sparsity._training.updates == 3", ["_training"]),
        ("quality._progress = None", ["_progress"]),
        ("from lightning_ddst.callbacks.plots import _MOST_POINTS, SparsityPlots", ["_MOST_POINTS"]),
        ("monkeypatch.setattr('lightning_ddst.callbacks.quality._PATIENCE', 0.0)", ["_PATIENCE"]),
        ("monkeypatch.setattr(quality, '_progress', None)", ["_progress"]),
        ("getattr(sparse.units, '_path')", ["_path"]),
        ("class Mine(GeneratorEMA):\n    def updates(self):\n        return self._average.updates", ["_average"]),
        ("class Mine:\n    def __init__(self):\n        self._average = 0\n        print(self._average)", []),
        ("assert parameter._version == 0 and not module._forward_hooks", []),
        ("from lightning_ddst.callbacks._support.reporting import RunReport", []),
        ("print(cifar['_training'], __name__, _training)", []),
    ],
)
def test_private_uses_are_found(source: str, uses: list[str]) -> None:
    private = ("_training", "_progress", "_MOST_POINTS", "_PATIENCE", "_path", "_average")
    assert private_uses(source, private) == uses


def test_private_names_are_those_of_the_package() -> None:
    names = private_names_of_the_package()
    assert {name for name in names if not is_private(name)} == set()
    assert "_origin" in names  # a function of utils/registry.py
    assert not names & {"_forward_hooks", "_version", "_parameters"}


@pytest.mark.parametrize("path", [path.relative_to(TESTS).as_posix() for path in sorted(TESTS.rglob("*.py"))])
def test_no_test_uses_a_private_name_of_the_package(path: str) -> None:
    assert private_uses((TESTS / path).read_text(), private_names_of_the_package()) == []
