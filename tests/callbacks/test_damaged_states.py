"""Checkpoints whose states were damaged: they are restored, or rejected by one line before anything has changed."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset
from toys import toy_trainer

from lightning_ddst import (
    DynamicSparsityCallback,
    GANModule,
    GeneratorEMA,
    SampleGrid,
    SampleQuality,
    SparsityPlots,
)
from lightning_ddst.data import ResumableLoader
from lightning_ddst.models import SmallDiscriminator, SmallGenerator

METHODS = {
    "auto": {"method": "ddst", "bounds": "auto", "growth": "momentum", "interval": 2, "explore_interval": 3},
    "imp": {"method": "imp"},
    "channels": {"method": "ddst", "granularity": "channel", "bounds": (0.01, 0.02), "interval": 2},
}
EPOCHS = 2


class Pixels(nn.Flatten):
    num_features = 64


class Scheduled(GANModule):
    def configure_optimizers(self) -> Any:
        optimizers, _ = super().configure_optimizers()
        return optimizers, [StepLR(optimizer, 10) for optimizer in optimizers]


def module() -> GANModule:
    seed_everything(0, verbose=False)
    generator = SmallGenerator(image_size=8, channels=1, width=4, latent_dim=4)
    return Scheduled(generator, SmallDiscriminator(image_size=8, channels=1, width=4))


def images() -> TensorDataset:
    return TensorDataset(torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1)


def callbacks(method: str) -> list[Callback]:
    return [
        DynamicSparsityCallback(0.5, **METHODS[method]),
        GeneratorEMA(),
        SampleQuality(Pixels(), "pixels", value_range=(-1, 1)),
        SampleGrid(4),
        SparsityPlots(),
    ]


def fit(own: list[Callback], gan: GANModule, ckpt_path=None, epochs: int = EPOCHS):
    trainer = toy_trainer(*own, epochs=epochs, num_sanity_val_steps=0)
    trainer.fit(gan, ResumableLoader(images(), 8, 4), DataLoader(images(), 8), ckpt_path=ckpt_path)
    return trainer


@pytest.fixture(scope="module", params=METHODS)
def saved(request, tmp_path_factory) -> tuple[str, dict[str, Any], Any]:
    path = tmp_path_factory.mktemp(request.param) / "a.ckpt"
    fit(callbacks(request.param), module()).save_checkpoint(path)
    return request.param, torch.load(path, weights_only=True), path.with_name("damaged.ckpt")


def own_parts(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The parts of a checkpoint that this package wrote, with keys that an error must hold."""
    loaders = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    return checkpoint["callbacks"] | {
        "ResumableLoader": loaders[0],
        "Scheduled": {key: checkpoint[key] for key in ("gan_updates", "gan_schedulers")},
    }


def replaced(checkpoint: dict[str, Any], owner: str, state: Any) -> dict[str, Any]:
    damaged = copy.copy(checkpoint)
    if owner == "Scheduled":
        return damaged | state
    if owner == "ResumableLoader":
        damaged["loops"] = copy.deepcopy(checkpoint["loops"])
        damaged["loops"]["fit_loop"]["state_dict"]["combined_loader"] = [state]
        return damaged
    return damaged | {"callbacks": checkpoint["callbacks"] | {owner: state}}


def places(state: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values in a state; of long lists and of names of layers only the first."""
    entries = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    for number, (key, value) in enumerate(entries):
        if number < 8 or not isinstance(state, list | tuple):
            yield (*path, key)
            yield from places(value, (*path, key))


MISSING = object()


def damages(value: Any) -> list[Any]:
    other = [MISSING, None, -1, 2, float("nan"), "text", [], {}, {"unknown": 1}, torch.zeros(3)]
    if isinstance(value, dict):
        other.append(value | {"unknown": 1})
    if isinstance(value, Tensor):
        more = [value[..., :0], value[None], value.bool(), value.double(), torch.zeros_like(value)]
        other += [value.float() * float("nan"), -value.float(), *more]
    return other


def damaged(state: Any, path: tuple, value: Any) -> Any:
    if not path:
        return value
    first, *rest = path
    if isinstance(state, dict):
        changed = {key: entry for key, entry in state.items() if key != first or rest or value is not MISSING}
        if rest or value is not MISSING:
            changed[first] = damaged(state[first], tuple(rest), value)
        return changed
    changed = list(state)
    if not rest and value is MISSING:
        del changed[first]
    else:
        changed[first] = damaged(state[first], tuple(rest), value)
    return changed


def cases(checkpoint: dict[str, Any]) -> list[tuple[str, tuple, Any]]:
    parts = own_parts(checkpoint)
    found = []
    for owner, state in parts.items():
        for path in places(state):
            value = state
            for key in path:
                value = value[key]
            found += [(owner, path, damage) for damage in damages(value)]
    return found


def load_damaged(checkpoint: dict[str, Any], owner: str, path: tuple, value: Any, method: str, file) -> str:
    """Resumes from a damaged checkpoint; returns the error, or an empty text."""
    state = damaged(own_parts(checkpoint)[owner], path, value)
    torch.save(replaced(checkpoint, owner, state), file)
    own, gan = callbacks(method), module()
    sparsity, average, quality, grid, plots = own
    empty = [each.state_dict() for each in own]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(own, gan, file)
    except ValueError as error:
        assert "\n" not in str(error)
        broken = next((each for each in own if each.state_key == owner), None)
        if broken is not None:
            assert broken.state_dict() == empty[own.index(broken)]
        assert sparsity.generator_updates in (0, 8)
        assert not any(each._forward_hooks or each._forward_pre_hooks for each in gan.modules())
        assert not any(o._optimizer_step_post_hooks for o in gan.trainer.optimizers)
        return str(error)
    return ""


STEP = 41
"""Every so many of the damages is tried; the long test tries all."""


def check(saved, step: int) -> None:
    method, checkpoint, file = saved
    rejected = 0
    for owner, path, value in cases(checkpoint)[::step]:
        said = load_damaged(checkpoint, owner, path, value, method, file)
        if said:
            rejected += 1
            assert said.startswith((owner, "the checkpoint")) or "=" in said, (owner, path, value, said)
    assert rejected


def test_a_damaged_state_is_restored_or_rejected_by_one_line(saved) -> None:
    check(saved, STEP)


@pytest.mark.long
def test_every_damaged_state_is_restored_or_rejected_by_one_line(saved) -> None:
    check(saved, 1)
