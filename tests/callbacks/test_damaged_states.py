"""Checkpoints whose states were damaged: they are restored, or rejected by one line before anything has changed."""

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
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


class SavesMidEpoch(Callback):
    """Saves after the second batch of the second epoch."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx == 5:
            trainer.save_checkpoint(self._path)


def fit(own: list[Callback], gan: GANModule, ckpt_path: Path | None = None) -> None:
    trainer = toy_trainer(*own, epochs=2, num_sanity_val_steps=0)
    trainer.fit(gan, ResumableLoader(images(), 8, 4), DataLoader(images(), 8), ckpt_path=ckpt_path)


@pytest.fixture(scope="module", params=METHODS)
def saved(request, tmp_path_factory) -> tuple[str, dict[str, Any], Any]:
    path = tmp_path_factory.mktemp(request.param) / "a.ckpt"
    fit([*callbacks(request.param), SavesMidEpoch(path)], module())
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
    """The paths of all values in a state; of lists and of names of layers and metrics only the first two."""
    entries = list(
        state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    )
    alike = [key for key, _ in entries if not str(key).isidentifier()]
    for key, value in entries:
        if key not in alike[2:]:
            yield (*path, key)
            yield from places(value, (*path, key))


MISSING = object()


def damages(value: Any) -> list[Any]:
    other = [MISSING, None, -1, 2, float("nan"), "text", [], {}, {"unknown": 1}, torch.zeros(3)]
    if isinstance(value, dict):
        other.append(value | {"unknown": 1})
    if isinstance(value, Tensor):
        more = [value.reshape(-1)[:0], value[None], value.bool(), value.double(), torch.zeros_like(value)]
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


def load_damaged(checkpoint: dict[str, Any], owner: str, path: tuple, value: Any, method: str, file: Path) -> str:
    """Resumes from a damaged checkpoint; returns the error, or an empty text."""
    state = damaged(own_parts(checkpoint)[owner], path, value)
    torch.save(replaced(checkpoint, owner, state), file)
    own, gan = callbacks(method), module()
    empty = {each.state_key: each.state_dict() for each in own}
    said = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(own, gan, file)
    except ValueError as error:
        said = str(error)
    if said:
        assert "\n" not in said
        assert all(each.state_dict() == empty[owner] for each in own if each.state_key == owner)
        assert own[0].generator_updates in (0, 6)  # no training
        assert not any(each._forward_hooks or each._forward_pre_hooks for each in gan.modules())
        assert not any(each._optimizer_step_post_hooks for each in gan.trainer.optimizers)
    return said


STEP = 41
"""Every so many of the damages is tried; the long test tries all."""


OTHERS = ("dataset has", "the saved masks are of", "the saved channels are not")
"""Parts of errors about a state of the right form, but of other data or networks."""


def check(saved, step: int) -> None:
    method, checkpoint, file = saved
    rejected = 0
    for owner, path, value in cases(checkpoint)[::step]:
        said = load_damaged(checkpoint, owner, path, value, method, file)
        if said:
            rejected += 1
            named = said.startswith(owner) or any(f"{key}=" in said for key in path)
            assert named or any(each in said for each in OTHERS), (owner, path, value, said)
    assert rejected


def test_a_damaged_state_is_restored_or_rejected_by_one_line(saved) -> None:
    check(saved, STEP)


@pytest.mark.long
def test_every_damaged_state_is_restored_or_rejected_by_one_line(saved) -> None:
    check(saved, 1)


# ---- messages ------------------------------------------------------------------------------------------

SPARSITY = "DynamicSparsityCallback"
OTHER_VERSION = "is missing: another version of lightning_ddst saved the checkpoint, or it is damaged."
NETWORKS = ("networks", "generator")
WEIGHT = "layers.4.weight"
DAMAGES = [
    ((*NETWORKS, "target"), 2, "networks.generator.target=2 must be a number in (0, 1]."),
    ((*NETWORKS, "target"), float("nan"), "networks.generator.target=nan must be a number in (0, 1]."),
    (("training", "updates"), -1, "training.updates=-1 must be an integer, at least 0."),
    (("training", "rewinds"), 1.5, "training.rewinds=1.5 must be an integer, at least 0."),
    (("training", "window", "added"), MISSING, f"training.window.added {OTHER_VERSION}"),
    (("length",), MISSING, f"length {OTHER_VERSION}"),
    (("method",), 3, "method=3 must be a text."),
]


def message_of(saved, owner: str, path: tuple, value: Any) -> str:
    method, checkpoint, file = saved
    return load_damaged(checkpoint, owner, path, value, method, file)


@pytest.mark.parametrize(("path", "value", "message"), DAMAGES)
def test_the_error_names_the_callback_the_key_the_value_and_what_is_allowed(path, value, message, saved) -> None:
    assert message_of(saved, SPARSITY, path, value) == f"{SPARSITY}: {message}"


def test_masks_without_an_active_weight_or_of_other_weights_are_rejected(saved) -> None:
    _, checkpoint, _ = saved
    masks = checkpoint["callbacks"][SPARSITY]["networks"]["generator"]["masks"]
    mask, path = masks[WEIGHT], (*NETWORKS, "masks")
    place = f"{SPARSITY}: networks.generator.masks[{WEIGHT!r}]="
    shape, allowed = tuple(mask.shape), "must be a bool tensor with a true entry."
    assert message_of(saved, SPARSITY, (*path, WEIGHT), mask & False) == f"{place}torch.bool {shape} {allowed}"
    assert message_of(saved, SPARSITY, (*path, WEIGHT), mask.float()) == f"{place}torch.float32 {shape} {allowed}"
    said = message_of(saved, SPARSITY, (*path, WEIGHT), torch.ones(2, 3, dtype=torch.bool))
    assert said.endswith(f"masks are another network's: {WEIGHT!r} is (2, 3) in the checkpoint, and {shape} here.")
    said = message_of(saved, SPARSITY, path, masks | {"other": mask})
    assert said.endswith(f"masks are another network's: 'other' is {shape} in the checkpoint, and missing here.")


QUALITY = "SampleQuality{'name': 'pixels'}"


@pytest.mark.parametrize(
    ("owner", "path", "value", "message"),
    [
        (
            "GeneratorEMA",
            ("ages", WEIGHT),
            torch.full((16, 8, 4, 4), -1.0),
            "must be a tensor of floating-point numbers",
        ),
        ("GeneratorEMA", ("averages", WEIGHT), torch.ones(3), "another network's: 'layers.4.weight' is (3,)"),
        (QUALITY, ("history",), {"a": [(-1, 2.0)]}, "history['a'][0][0]=-1 must be an integer, at least 0."),
        ("SampleGrid", ("dark",), 1, "dark=1 must be True or False."),
        ("SparsityPlots", ("validations",), "two", "validations='two' must be an integer, at least 0."),
        ("ResumableLoader", ("samples",), -8, "samples=-8 must be an integer, at least 0."),
        ("Scheduled", ("gan_updates",), (4, -1), "gan_updates[1]=-1 must be an integer, at least 0."),
        ("Scheduled", ("gan_schedulers", 0, "due"), MISSING, f"gan_schedulers[0].due {OTHER_VERSION}"),
    ],
)
def test_other_states_are_checked(owner, path, value, message, saved) -> None:
    said = message_of(saved, owner, path, value)
    assert said.startswith(f"{owner}: ")
    assert message in said


@pytest.mark.parametrize("key", ["gradients", "mask_updates"])
def test_a_rejected_state_is_not_resumed_by_the_next_fit(key, saved) -> None:
    method, checkpoint, file = saved
    torch.save(replaced(checkpoint, SPARSITY, damaged(checkpoint["callbacks"][SPARSITY], ("training", key), [])), file)
    own = callbacks(method)
    with pytest.raises(ValueError, match=f"^{SPARSITY}: .*{key} must have . entries, and has 0"):
        fit(own, module(), file)
    assert own[0].state_dict() == {}
    fit(own, module())
    assert own[0].generator_updates == 8
