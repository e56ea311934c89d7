import copy
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim import Adam, Optimizer

from lightning_ddst.utils.configurations import check_classes, read_yaml, without_optimizers


class Parent(nn.Module):
    def __init__(self, optimizer: OptimizerCallable, width: int = 3) -> None:
        super().__init__()
        self.made = optimizer


class Module(Parent):
    def __init__(
        self,
        activation: Callable[[torch.Tensor], torch.Tensor] = torch.relu,
        schedule: LRSchedulerCallable | None = None,
        second: OptimizerCallable | None = None,
        inner: nn.Module | None = None,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self.schedule, self.second, self.inner = schedule, second, inner


def make_linear(size: int = 2) -> nn.Linear:
    return nn.Linear(size, size)


def make_adam(params: Any) -> Adam:
    return Adam(params)


def make_anything(size: int = 2) -> Any:
    raise AssertionError("was called")


def make_nothing(size: int = 2) -> None:
    raise AssertionError("was called")


@pytest.fixture(autouse=True)
def users(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "users", sys.modules[__name__])


def config(**arguments: Any) -> dict:
    return {"model": {"class_path": "users.Module", "init_args": arguments}}


@pytest.mark.parametrize(
    "arguments",
    [
        {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}},
        {"optimizer": "users.make_adam", "second": None},
        {"optimizer": "torch.optim.Adam"},
        {"optimizer": {"class_path": "not_installed.Lion"}},  # the parser's to report
        {"inner": {"class_path": "users.make_linear"}},
        {"activation": "torch.nn.functional.relu"},
        {"activation": {"class_path": "torch.nn.ReLU"}},
        {"width": "os.system"},  # a string
    ],
)
def test_classes_and_functions_that_return_them_are_allowed(arguments: dict) -> None:
    check_classes(config(**arguments))


@pytest.mark.parametrize("path", ["os.system", "print", "users.make_anything", "users.make_nothing", "torch.load"])
@pytest.mark.parametrize("place", ["optimizer", "second", "activation", "inner", "schedule"])
def test_functions_that_may_do_anything_are_rejected(path: str, place: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^model\.init_args\.{place}='{path}' must be a (class, or|subclass of torch)"
    ):
        check_classes(config(**{place: {"class_path": path}}))
    nested = {"class_path": "users.Module", "init_args": {place: {"class_path": path}}}
    with pytest.raises(ValueError, match=rf"^model\.init_args\.inner\.init_args\.{place}='{path}' must be a "):
        check_classes(config(inner=nested))
    with pytest.raises(ValueError, match=rf"^callbacks\.1='{path}' must be a class"):
        check_classes({"callbacks": [{"class_path": "users.Module"}, {"class_path": path}]})


@pytest.mark.parametrize("place", ["optimizer", "second"])
@pytest.mark.parametrize("value", ["users.make_linear", "torch.nn.Linear", {"class_path": "users.make_adam"}])
def test_optimizers_must_be_subclasses(place: str, value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"must be a subclass of torch\.optim\.Optimizer, such as torch\.optim\.Adam\.$"
    ):
        check_classes(config(**{place: value}))


@pytest.mark.parametrize("text", ["text", 3, None, [], {"model": "other.yaml"}, {"class_path": 3, "init_args": {}}])
def test_other_contents_are_left_to_the_parser(text: Any) -> None:
    check_classes(text)
    assert without_optimizers(text) == text


BOMB = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefgh"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: \xff\xfe", "it is not a YAML file: 'utf-8' codec can't decode byte 0xff"),
        (b"a: [", "it is not a YAML file: while parsing a flow node"),
        (b"a: !!python/object/apply:os.system [touch called]", "it is not a YAML file: could not determine a constr"),
        (b"a: &a [*a]", "it holds more than 100,000 values"),
        (b"a: &a [x, x, x]\n" + BOMB.encode(), "it holds more than 100,000 values"),
        (b"a: " + b"[" * 5000, "it is nested too deeply"),
    ],
)
def test_a_file_that_is_no_configuration_is_rejected_by_one_line(content, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_yaml(tmp_path / "a.yaml")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]


def test_aliases_are_allowed(tmp_path) -> None:
    (tmp_path / "a.yaml").write_text("a: &a [1, 2]\nb: {c: *a}")
    assert read_yaml(tmp_path / "a.yaml") == {"a": [1, 2], "b": {"c": [1, 2]}}


def test_a_module_is_made_without_optimizers() -> None:
    missing = {"class_path": "not_installed.Lion"}
    inner = {"class_path": "users.Module", "init_args": {"optimizer": missing, "width": 5}}
    given = config(optimizer=missing, second=missing, schedule=missing, inner=inner, width=4)["model"]
    before = copy.deepcopy(given)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "model")
    module = parser.instantiate_classes(parser.parse_object({"model": without_optimizers(given)})).model
    assert given == before
    assert module.second is module.schedule is None
    for made in (module.made, module.inner.made):
        with pytest.raises(RuntimeError, match="made without optimizers"):
            made([])
    assert not isinstance(module.made, Optimizer)
