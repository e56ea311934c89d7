import copy
import random

import numpy as np
import pytest
import torch
from crashes import assert_resumed_alike, fit, last_checkpoint
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset
from toys import WEIGHTS_ONLY, ToyGAN, toy_data, toy_trainer

from lightning_ddst import DynamicSparsityCallback, GANModule
from lightning_ddst.data import ResumableLoader
from lightning_ddst.models import SmallDiscriminator, SmallGenerator

METHODS = {
    "static": {"method": "static"},
    "sdst": {"method": "sdst"},
    "ddst": {"method": "ddst", "bounds": (0.01, 0.02)},
    "strict": {"method": "ddst", "bounds": (0.01, 0.02), "max_discriminator_density": 0.4},
    "auto": {"method": "ddst", "bounds": "auto", "interval": 2},
    "signal": {"method": "ddst", "signal": "real_sign", "bounds": (0.9, 0.95)},
    "ramp": {"method": "ramp"},
    "posthoc": {"method": "posthoc"},
    "imp": {"method": "imp"},
    "channels": {"method": "ddst", "bounds": (0.01, 0.02), "granularity": "channel"},
}
# With D stepping twice an update: explorations at batches 10, 20, ..., decisions at 14, 28, 42; 12 batches an epoch.
SETTINGS = {"generator_density": 0.3, "interval": 7, "explore_interval": 5, "probe_interval": 1, "seed": 1}


def small_gan() -> GANModule:
    generator = SmallGenerator(image_size=8, channels=1, width=4, latent_dim=4)
    return GANModule(generator, SmallDiscriminator(image_size=8, channels=1, width=4), discriminator_steps=2)


def images() -> TensorDataset:
    return TensorDataset(torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1)


def resumable() -> ResumableLoader:
    return ResumableLoader(images(), batch_size=8, batches=12)


CRASHES = {
    "before an exploration": (20, 3),
    "after an exploration": (21, 10),
    "before a decision": (28, 9),
    "after a decision": (29, 14),
    "at an epoch's end": (25, 8),
    "between discriminator steps": (18, 17),
}


MOVES = {
    "static": set(),
    "sdst": set(),
    "ddst": {"grow"},
    "strict": {"grow", "explore"},
    "auto": {"grow"},
    "signal": {"grow", "prune"},
    "ramp": {"grow"},
    "posthoc": {"prune"},
    "imp": {"prune"},
    "channels": {"grow"},
}
"""Decisions that each makes at least once."""
FEW = ("between discriminator steps",)
"""Kills of methods that change masks at the same updates as others."""


@pytest.mark.parametrize(
    ("crash", "method"),
    [(c, m) for c in CRASHES for m in METHODS if m in ("static", "sdst", "ddst", "strict", "channels") or c in FEW],
)
def test_a_killed_run_resumes_as_if_uninterrupted(tmp_path, crash, method):
    kill, every = CRASHES[crash]
    # A batch is one step of an optimizer, or two: 3 in 2 batches.
    every = every * 3 // 2
    settings = SETTINGS | METHODS[method]
    callback = assert_resumed_alike(small_gan, resumable, tmp_path, every=every, kill=kill, **settings)
    assert callback.generator_updates == 24
    assert MOVES[method] <= {decision.action for _, decision in callback.decisions}


# ---- a GAN and a loader of the user's own -----------------------------------------------------------

PLAIN = {"generator_density": 0.3, "interval": 4, "explore_interval": 3, "bounds": (0.2, 0.3), "seed": 1}


def shuffled() -> DataLoader:
    return DataLoader(toy_data(7).dataset, batch_size=8, shuffle=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_resumes_identically_from_an_epochs_end_with_any_loader(tmp_path, workers):
    def data():
        return DataLoader(toy_data(7).dataset, batch_size=8, shuffle=True, num_workers=workers)

    assert_resumed_alike(ToyGAN, data, tmp_path, every=None, kill=16, **PLAIN)


def test_resuming_mid_epoch_warns_that_the_loader_cannot_resume(tmp_path):
    fit(ToyGAN, shuffled, tmp_path, every=6, kill=13, **PLAIN)
    with pytest.warns(UserWarning, match="after batch 5 of an epoch, .*train loader"):
        fit(ToyGAN, shuffled, tmp_path, every=6, resume=last_checkpoint(tmp_path), **PLAIN)


class NumPyGAN(ToyGAN):
    """Draws noise from NumPy's and Python's global random states."""

    def training_step(self, batch, batch_idx):
        (real,) = batch
        noise = torch.from_numpy(np.random.randn(*real.shape)).float()  # noqa: NPY002 -- the global state
        super().training_step((real + 0.1 * noise + 0.1 * random.random(),), batch_idx)


@pytest.mark.parametrize("kill", [15, 16])
def test_numpys_and_pythons_random_states_are_resumed(tmp_path, kill):
    def data():
        return ResumableLoader(toy_data(7).dataset, batch_size=8, batches=7)

    assert_resumed_alike(NumPyGAN, data, tmp_path, every=4, kill=kill, **PLAIN)


class AccumulatingGAN(ToyGAN):
    """Gradients of both networks add up over three batches."""

    def training_step(self, batch, batch_idx):
        generator, discriminator = self.networks()
        (real,) = batch
        noise = torch.randn(2, len(real), 8)
        loss = discriminator(generator(noise[0]).detach()).mean() - discriminator(real).mean()
        loss = loss + real.new_tensor(0.1) * discriminator(real).square().mean()
        self.manual_backward(loss)
        generator_optimizer, discriminator_optimizer = self.optimizers()
        if batch_idx % 3 == 2:
            discriminator_optimizer.step()
            discriminator_optimizer.zero_grad()
        self.toggle_optimizer(generator_optimizer)
        self.manual_backward(-discriminator(generator(noise[1])).mean())
        self.untoggle_optimizer(generator_optimizer)
        if batch_idx % 3 == 2:
            generator_optimizer.step()
            generator_optimizer.zero_grad()


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
@pytest.mark.parametrize("kill", [8, 20, 21])
def test_gradients_that_wait_for_a_step_are_resumed(tmp_path, monkeypatch, growth, kill):
    def data():
        return ResumableLoader(toy_data(7).dataset, batch_size=8, batches=12)

    save_every_batch(monkeypatch)
    settings = PLAIN | {"explore_interval": 1, "interval": 2, "growth": growth}
    assert_resumed_alike(AccumulatingGAN, data, tmp_path, every=1, kill=kill, **settings)


def save_every_batch(monkeypatch):
    # ModelCheckpoint goes by optimizer steps, of which most batches here have none.
    def save(self, trainer, *_):
        batches = trainer.fit_loop.total_batch_idx + 1
        trainer.save_checkpoint(f"{self.dirpath}/step={batches}.ckpt")

    monkeypatch.setattr("lightning.pytorch.callbacks.ModelCheckpoint.on_train_batch_end", save)


# ---- checkpoints that do not fit --------------------------------------------------------------------


def test_a_checkpoint_without_masks_is_rejected(tmp_path):
    dense(tmp_path)
    with pytest.raises(ValueError, match=r'no masks for DynamicSparsityCallback.*initial_masks="magnitude"'):
        fit(ToyGAN, toy_data, tmp_path, every=None, resume=last_checkpoint(tmp_path), **PLAIN)


def test_a_checkpoint_without_masks_is_a_dense_start_where_asked(tmp_path):
    trained = dense(tmp_path)
    *_, callback = fit(
        ToyGAN,
        toy_data,
        tmp_path,
        every=None,
        resume=last_checkpoint(tmp_path),
        initial_masks="magnitude",
        **{k: v for k, v in PLAIN.items() if k != "bounds"} | {"method": "static", "scope": "layer"},
    )
    assert callback.generator_updates == 20  # 2 of 4 epochs are left
    for name, mask in callback.masks("generator").items():
        sizes = trained.get_parameter(name).detach().abs()
        assert sizes[mask].min() >= sizes[~mask].max()


def dense(folder):
    seed_everything(0, verbose=False)
    gan = ToyGAN()
    toy_trainer(ModelCheckpoint(folder, "{step}"), epochs=2, enable_checkpointing=True).fit(gan, toy_data())
    return gan


def test_a_checkpoint_of_other_networks_names_is_rejected(tmp_path):
    fit(ToyGAN, toy_data, tmp_path, every=None, epochs=1, **PLAIN)
    with pytest.raises(ValueError, match=r"no masks for .*generator.*but for DynamicSparsityCallback\."):
        fit(ToyGAN, toy_data, tmp_path, every=None, resume=last_checkpoint(tmp_path), generator="generator", **PLAIN)


def test_masks_of_another_network_are_rejected(tmp_path):
    fit(ToyGAN, toy_data, tmp_path, every=None, epochs=1, **PLAIN)
    with pytest.raises(ValueError, match=r"dense_layers=.*checkpoint"):
        fit(
            ToyGAN,
            toy_data,
            tmp_path,
            every=None,
            resume=last_checkpoint(tmp_path),
            dense_layers=["generator.0"],
            **PLAIN,
        )


def test_raw_optimizers_are_warned_of(tmp_path):
    class Raw(ToyGAN):
        def optimizers(self, use_pl_optimizer=True):
            return super().optimizers(use_pl_optimizer=False)

    with pytest.warns(UserWarning, match="global_step is still 0.*ModelCheckpoint saves nothing") as warned:
        fit(Raw, toy_data, tmp_path, every=None, epochs=1, **PLAIN)
    assert sum("global_step" in str(warning.message) for warning in warned) == 1


# ---- in the middle of what is counted, and in other precisions ----------------------------------------


class Uneven(ToyGAN):
    """The discriminator makes two, three and two steps until the generator's updates."""

    def training_step(self, batch, batch_idx):
        (real,) = batch
        generator, discriminator = self.networks()
        for optimizer, sign in zip(self.optimizers()[::-1], (1, -1), strict=True):
            if sign == 1 or batch_idx in (1, 4, 6):
                fake = generator(torch.randn(len(real), 8, dtype=real.dtype))
                optimizer.zero_grad()
                self.manual_backward(sign * (discriminator(fake).mean() - discriminator(real).mean()))
                optimizer.step()


@pytest.mark.parametrize("kill", [2, 3, 4, 5, 6, 7])
def test_operations_of_a_step_that_is_under_way_are_resumed(tmp_path, monkeypatch, kill):
    def data():
        return ResumableLoader(toy_data(7).dataset, batch_size=8, batches=10)

    save_every_batch(monkeypatch)
    arguments = {"every": 1, "epochs": 1} | PLAIN
    *_, whole = fit(Uneven, data, tmp_path / "whole", **arguments)
    fit(Uneven, data, tmp_path / "killed", kill=kill, **arguments)
    checkpoint = last_checkpoint(tmp_path / "killed")
    *_, resumed = fit(Uneven, data, tmp_path / "resumed", resume=checkpoint, **arguments)
    assert whole.generator_updates == resumed.generator_updates == 3
    assert whole.flops_ledger == resumed.flops_ledger
    assert whole.flops_ratio == resumed.flops_ratio


def test_a_run_in_64_bits_resumes_bit_for_bit(tmp_path):
    def train(folder, epochs, resume=None):
        seed_everything(5, verbose=False)
        gan = Uneven()
        callbacks = DynamicSparsityCallback(0.3, method="static", seed=1), ModelCheckpoint(folder, filename="last")
        trainer = toy_trainer(*callbacks, epochs=epochs, precision="64-true", enable_checkpointing=True)
        trainer.fit(gan, toy_data(), ckpt_path=resume)
        return gan.state_dict()

    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "half", 2)
    resumed = train(tmp_path / "resumed", 4, tmp_path / "half" / "last.ckpt")
    assert whole["generator.0.weight"].dtype == torch.float64
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize("callbacks", [(), (DynamicSparsityCallback(0.3, method="static"),)])
def test_a_run_that_resumed_after_an_epochs_last_batch_resumes_again(callbacks, tmp_path):
    def run(folder, ckpt_path=None):
        generator = SmallGenerator(image_size=8, channels=1, width=2, latent_dim=4)
        gan = GANModule(generator, SmallDiscriminator(image_size=8, channels=1, width=2))
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
        trainer = toy_trainer(*copy.deepcopy(callbacks), saving, epochs=3, enable_checkpointing=True)
        trainer.fit(gan, ResumableLoader(images(), batch_size=4, batches=3), ckpt_path=ckpt_path, **WEIGHTS_ONLY)
        return gan.generator_updates

    assert run(tmp_path / "whole") == 9
    assert run(tmp_path / "once", tmp_path / "whole" / "step=6.ckpt") == 9  # of 3 updates
    for step in (8, 12, 14):
        assert run(tmp_path / "twice", tmp_path / "once" / f"step={step}.ckpt") == 9
    assert run(tmp_path / "ended", tmp_path / "once" / "step=18.ckpt") == 9
