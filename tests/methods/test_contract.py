"""The contract of every registered method at every granularity; a new method is tested without a new line."""

from dataclasses import fields

import pytest
import torch
from commands import parsed
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from toys import OtherLayersGAN, ToyGAN, toy_data, toy_trainer

from lightning_ddst import DynamicSparsityCallback
from lightning_ddst.methods import METHODS, make_method
from lightning_ddst.methods.base import ROLES
from lightning_ddst.sparsity import find_units

DENSITIES = {"weight": 0.25, "channel": 0.4, "2:4": 0.5}
OFTEN = {"interval": 4, "explore_interval": 3, "probe_interval": 1}


def flat(method, granularity, **more):
    """Arguments that every method takes, and bounds that lead to resizing where it has bounds."""
    bounds = {"bounds": (0.0, 1e-9)} if "bounds" in METHODS[method].arguments() else {}
    return {"generator_density": DENSITIES[granularity]} | bounds | more


def made(method, granularity):
    return DynamicSparsityCallback(method=method, granularity=granularity, seed=3, **flat(method, granularity), **OFTEN)


def is_possible(method, granularity):
    """N:M has one density: no method that starts dense or resizes."""
    kind = make_method(method, flat(method, granularity))
    fixed = find_units(granularity).fixed_density is not None
    return not fixed or not (kind.starts_dense or any(update.resizes for update in kind.mask_updates()))


CELLS = [(m, g, ToyGAN) for m in METHODS for g in DENSITIES if is_possible(m, g)]
CELLS += [(method, "weight", OtherLayersGAN) for method in ("ddst", "posthoc", "imp")]
IMPOSSIBLE = [(m, g) for m in METHODS for g in DENSITIES if not is_possible(m, g)]


class EveryStep(Callback):
    """Checks counts and zeros after every step of every optimizer."""

    def __init__(self, sparsity):
        self.sparsity, self.steps, self.densities = sparsity, 0, set()

    def on_train_start(self, trainer, pl_module):  # after the callback's hooks
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda optimizer, *_: self.check(optimizer, pl_module))

    def check(self, optimizer, module):
        self.steps += 1
        parameters = dict(module.named_parameters())
        for role, network in self.sparsity.networks().items():
            masks = self.sparsity.masks(role)
            assert network.active == sum(int(mask.sum()) for mask in masks.values())
            assert network.active == sum(network.allocation(network.target).values())
            self.densities.add((role, network.target))
            for weight in network.weights.values():
                effective = weight.effective()
                assert effective.isfinite().all()
                assert not effective[~network.masks[weight.name]].any()
            for name, mask in masks.items():
                inactive = parameters[name][~mask]
                assert not inactive.any()
                assert not inactive.signbit().any()
                for value in optimizer.state.get(parameters[name], {}).values():
                    assert value.dim() == 0 or not value[~mask].any()


@pytest.mark.parametrize(("method", "granularity", "make"), CELLS)
def test_counts_are_exact_and_inactive_weights_zero_after_every_step(method, granularity, make):
    sparsity = made(method, granularity)
    check = EveryStep(sparsity)
    seed_everything(0, verbose=False)
    toy_trainer(sparsity, check, epochs=3).fit(make(), toy_data())
    assert check.steps == 60
    settings = sparsity.settings
    for role in ROLES:
        seen = {density for name, density in check.densities if name == role}
        resized = any(update.resizes and role in update.roles for update in settings.mask_updates())
        assert min(seen) >= settings.lowest_densities[role]
        assert resized or seen == {settings.initial_densities[role]}


class Stop(Exception):
    pass


class StopAt(Callback):
    """Kills the run at the end of a batch."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.fit_loop.total_batch_idx + 1 == 20:
            raise Stop


def run(folder, make, sparsity, *callbacks, ckpt_path=None):
    seed_everything(0, verbose=False)
    gan = make()
    toy_trainer(sparsity, *callbacks, epochs=3, enable_checkpointing=True, default_root_dir=folder).fit(
        gan, toy_data(), ckpt_path=ckpt_path
    )
    return gan, sparsity


@pytest.mark.parametrize(("method", "granularity", "make"), CELLS)
def test_a_killed_run_resumes_bit_for_bit(method, granularity, make, tmp_path):
    gan, whole = run(tmp_path, make, made(method, granularity), ModelCheckpoint(tmp_path / "whole"))
    saving = ModelCheckpoint(tmp_path / "killed", filename="last")
    with pytest.raises(Stop):
        run(tmp_path, make, made(method, granularity), saving, StopAt())
    resumed_gan, resumed = run(tmp_path, make, made(method, granularity), ckpt_path=tmp_path / "killed" / "last.ckpt")
    expected = gan.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed_gan.state_dict().items())
    for role in ROLES:
        assert all(torch.equal(mask, whole.masks(role)[name]) for name, mask in resumed.masks(role).items())
    assert resumed.decisions == whole.decisions
    assert (resumed.flops_ratio, resumed.measurements) == (whole.flops_ratio, whole.measurements)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_the_same_by_name_as_an_object_and_from_yaml(method, monkeypatch):
    kind = METHODS[method]
    given = flat(method, "weight")
    as_object = kind(**given)
    assert make_method(method, given) == as_object
    assert DynamicSparsityCallback(method=as_object).settings == as_object
    path = f"{kind.__module__}.{kind.__qualname__}"
    options = [f"--sparsity.method.{name}={list(v) if isinstance(v, tuple) else v}" for name, v in given.items()]
    command = parsed(monkeypatch, f"--sparsity.method={path}", *options)
    text = command.parser.dump(command.config)
    again = command.parser.parse_string(text)
    assert again.sparsity.method == command.config.sparsity.method
    assert again.sparsity.method.class_path == path
    assert again.sparsity.method.init_args.generator_density == 0.25


@pytest.mark.parametrize("method", METHODS)
def test_bad_arguments_are_rejected_by_name_and_value(method):
    kind = METHODS[method]
    for name in ("generator_density", "discriminator_density"):
        for value in (0.0, -0.1, 1.5):
            with pytest.raises(ValueError, match=rf"{name}={value}.*\(0, 1\]"):
                make_method(method, {"generator_density": 0.25} | {name: value})
    others = {field.name for other in METHODS.values() for field in fields(other)} - set(kind.arguments())
    for name in others:
        with pytest.raises(ValueError, match=f"{name}=0.5.*generator_density"):
            make_method(method, {"generator_density": 0.25, name: 0.5})
    with pytest.raises(ValueError, match=r"generator_density=0\.3"):
        make_method(kind(generator_density=0.25), {"generator_density": 0.3})


@pytest.mark.parametrize(("method", "granularity"), IMPOSSIBLE)
def test_a_granularity_of_one_density_rejects_methods_that_need_others(method, granularity):
    with pytest.raises(ValueError, match=f'granularity="{granularity}"'):
        made(method, granularity)
