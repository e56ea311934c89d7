import copy
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import SGD, Adam
from toys import LATENT, PIXELS, ToyGAN, toy_data, toy_trainer, trained

from lightning_ddst import DynamicSparsityCallback, GeneratorEMA

State = dict[str, Tensor]


def copied(network: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


class WatchedGAN(ToyGAN):
    """Writes down which generator each evaluation has."""

    def __init__(self, names: tuple[str, str] = ("generator", "discriminator")) -> None:
        super().__init__(names)
        self.seen: list[State] = []

    def validation_step(self, batch, batch_idx) -> None:
        self.seen.append(copied(self.networks()[0]))

    test_step = predict_step = validation_step


class Trajectory(Callback):
    """Writes down the generator after each of its updates."""

    def __init__(self) -> None:
        self.states: list[State] = []

    def on_fit_start(self, trainer, pl_module) -> None:
        generator = pl_module.networks()[0]
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.states.append(copied(generator)))

    def mean(self, name: str, until: int | None = None) -> Tensor:
        return torch.stack([state[name] for state in self.states[:until]]).double().mean(0).float()


class SameDraws(Callback):
    """Makes a batch's random numbers depend on its place in the run only, so that runs in parts can be compared."""

    def on_train_batch_start(self, trainer, *_) -> None:
        torch.manual_seed(trainer.global_step)


def one_batch():
    return toy_data(batches=1)


def evaluated(*callbacks: Callback, gan: ToyGAN | None = None, epochs: int = 1, **settings) -> ToyGAN:
    """A toy GAN that was validated before training and after every epoch."""
    seed_everything(0, verbose=False)
    gan = gan or WatchedGAN()
    toy_trainer(*callbacks, epochs=epochs, **settings).fit(gan, toy_data(), one_batch())
    return gan


WEIGHTS = ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var", "3.weight")


# ---- what it does --------------------------------------------------------------------------------------


def test_validation_sees_the_mean_of_the_weights_so_far() -> None:
    seed_everything(0, verbose=False)
    gan, path = WatchedGAN(), Trajectory()
    initial = copied(gan.generator)
    evaluated(GeneratorEMA(0.999), path, gan=gan, epochs=2)
    assert len(path.states) == 20
    before, first, second = gan.seen
    assert same(before, initial)
    for name in WEIGHTS:
        # A decay of 0.999 spans 1,000 updates, so of 20 it is the plain mean.
        torch.testing.assert_close(first[name], path.mean(name, until=10), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(second[name], path.mean(name), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(second[name], path.states[-1][name], rtol=1e-3)
    assert torch.equal(second["1.num_batches_tracked"], path.states[-1]["1.num_batches_tracked"])


def test_a_short_average_follows_the_formula() -> None:
    path = Trajectory()
    gan = evaluated(GeneratorEMA(0.5), path)
    expected = path.states[0]["0.weight"]
    for state in path.states[1:]:
        expected = 0.5 * expected + 0.5 * state["0.weight"]
    torch.testing.assert_close(gan.seen[-1]["0.weight"], expected, rtol=1e-5, atol=1e-6)


def test_statistics_can_be_the_present_ones() -> None:
    path = Trajectory()
    gan = evaluated(GeneratorEMA(0.999, buffers="copy"), path)
    assert torch.equal(gan.seen[-1]["1.running_mean"], path.states[-1]["1.running_mean"])
    torch.testing.assert_close(gan.seen[-1]["0.weight"], path.mean("0.weight"), rtol=1e-5, atol=1e-6)


def test_own_weights_are_there_for_a_while() -> None:
    ema = GeneratorEMA(0.9)
    gan, seen = WatchedGAN(), []

    class Looks(Callback):
        def on_validation_epoch_end(self, trainer, pl_module) -> None:
            seen.append(copied(gan.generator))
            with suppress(ZeroDivisionError), ema.own_weights():
                seen.append(copied(gan.generator))
                raise ZeroDivisionError
            seen.append(copied(gan.generator))

    seed_everything(0, verbose=False)
    trainer = toy_trainer(ema, Looks())
    trainer.fit(gan, toy_data())
    own = copied(gan.generator)
    with ema.own_weights():  # outside of evaluation they are there anyway
        assert same(copied(gan.generator), own)
    trainer.validate(gan, one_batch(), verbose=False)
    averaged, inside, after = seen
    assert same(inside, own)
    assert same(averaged, after)
    assert not same(averaged, own)


@pytest.mark.parametrize("evaluation", ["validate", "test", "predict"])
def test_every_evaluation_sees_the_average_and_gives_the_weights_back(evaluation: str) -> None:
    ema = GeneratorEMA(0.999)
    gan = WatchedGAN()
    seed_everything(0, verbose=False)
    trainer = toy_trainer(ema)
    trainer.fit(gan, toy_data())
    own = copied(gan.generator)
    getattr(trainer, evaluation)(gan, one_batch())
    (seen,) = gan.seen
    averages = ema.averages()
    assert averages.keys() == {name for name in own if "num_batches" not in name}
    assert all(torch.equal(seen[name], value) for name, value in averages.items())
    assert not torch.equal(seen["0.weight"], own["0.weight"])
    assert same(copied(gan.generator), own)


@pytest.mark.parametrize("sparsity", [None, "first", "last"])
def test_training_is_bit_identical_to_a_run_without(sparsity: str | None) -> None:
    def run(*callbacks: Callback) -> State:
        if sparsity is not None:
            dynamic = DynamicSparsityCallback(0.25, interval=4, explore_interval=3, bounds=(0.0, 1e-9))
            callbacks = (dynamic, *callbacks) if sparsity == "first" else (*callbacks, dynamic)
        return copied(evaluated(*callbacks, epochs=2))

    assert same(run(GeneratorEMA(0.9)), run())


def test_the_discriminator_is_evaluated_as_it_is() -> None:
    class Discriminators(WatchedGAN):
        def validation_step(self, batch, batch_idx) -> None:
            self.seen.append(copied(self.discriminator))

    gan = evaluated(GeneratorEMA(0.9), gan=Discriminators())
    assert same(gan.seen[-1], copied(gan.discriminator))


class SpectralGAN(WatchedGAN):
    """A generator with spectral norm; writes down what its layers multiply by in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            spectral_norm(nn.Linear(LATENT, 32)), nn.ReLU(), spectral_norm(nn.Linear(32, PIXELS))
        )

    def configure_optimizers(self):
        # Fast enough that the weights turn within an epoch.
        return [SGD(self.generator.parameters(), lr=5.0), Adam(self.discriminator.parameters(), lr=1e-2)]

    def validation_step(self, batch, batch_idx) -> None:
        norms = [torch.linalg.matrix_norm(self.generator[i].weight, 2).item() for i in (0, 2)]
        self.seen.append(norms)


@pytest.mark.parametrize("callbacks", [[], [DynamicSparsityCallback(0.25, explore_interval=2, interval=5)]])
def test_a_generator_with_spectral_norm_is_evaluated_with_norm_one(callbacks: list) -> None:
    gan, path = SpectralGAN(), Trajectory()
    evaluated(*callbacks, GeneratorEMA(0.9), path, gan=gan, epochs=2)
    assert len(gan.seen) == 3
    assert gan.seen[1] == pytest.approx([1, 1], abs=1e-3)
    assert gan.seen[2] == pytest.approx([1, 1], abs=1e-3)
    assert same(copied(gan.generator), path.states[-1])  # with the vectors


# ---- with dynamic sparsity -----------------------------------------------------------------------------


class AverageOfActive(Callback):
    """Averages by hand: each weight over the updates since it grew; checks the averages at every update."""

    def __init__(self, ema: GeneratorEMA, sparsity: DynamicSparsityCallback) -> None:
        self.ema = ema
        self.sparsity = sparsity
        self.sums: State = {}
        self.counts: State = {}
        self.updates = self.grown = 0

    def on_train_start(self, trainer, pl_module) -> None:
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.check(pl_module))

    def check(self, module: ToyGAN) -> None:
        averages, parameters = self.ema.averages(), dict(module.generator.named_parameters())
        self.updates += 1
        for full_name, mask in self.sparsity.masks("generator").items():
            name = full_name.removeprefix("generator.")
            value = parameters[name].detach()
            sums = self.sums.setdefault(name, torch.zeros_like(value))
            counts = self.counts.setdefault(name, torch.zeros_like(value))
            just_grown = mask & (value == 0)
            self.grown += int(just_grown.sum())
            sums += value
            counts += 1
            for total in (sums, counts):
                total[~mask | just_grown] = 0
            assert torch.all(averages[name][~mask] == 0)
            torch.testing.assert_close(averages[name], sums / counts.clamp(min=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("first", ["sparsity", "ema"])
@pytest.mark.parametrize("method", ["static", "ddst"])
def test_inactive_weights_are_zero_and_grown_ones_not_dragged_by_zeros(method, first: str) -> None:
    ema = GeneratorEMA(0.999)
    sparsity = DynamicSparsityCallback(0.25, method=method, interval=5, explore_interval=3)
    check = AverageOfActive(ema, sparsity)
    trained(*((sparsity, ema) if first == "sparsity" else (ema, sparsity)), check, epochs=2)
    assert check.updates == 20
    assert (check.grown > 100) == (method == "ddst")  # 6 explorations of up to half of 192


@pytest.mark.parametrize("first", ["sparsity", "ema"])
def test_the_generator_that_is_evaluated_is_sparse_before_training_too(first: str) -> None:
    ema, sparsity = GeneratorEMA(), DynamicSparsityCallback(0.25, method="static")
    gan = evaluated(*((sparsity, ema) if first == "sparsity" else (ema, sparsity)))
    # 192 of 768 weights.
    assert [sum(int(seen[name].count_nonzero()) for name in ("0.weight", "3.weight")) for seen in gan.seen] == [192] * 2


# ---- saving --------------------------------------------------------------------------------------------


def checkpointed(folder: Path, *callbacks: Callback, **settings) -> tuple[ToyGAN, Path]:
    gan = evaluated(*callbacks, folder=folder, **settings)
    (path,) = folder.rglob("*.ckpt")
    return gan, path


@pytest.mark.parametrize("evaluation", ["validate", "test", "predict"])
def test_a_checkpoint_is_evaluated_with_its_average(evaluation: str, tmp_path) -> None:
    ema = GeneratorEMA(0.9)
    gan, path = checkpointed(tmp_path, ema, epochs=2)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert same(saved, copied(gan))  # training's own weights

    again = WatchedGAN()
    getattr(toy_trainer(GeneratorEMA(0.9)), evaluation)(again, one_batch(), ckpt_path=path)
    (seen,) = again.seen
    assert all(torch.equal(seen[name], value) for name, value in ema.averages().items())
    assert same(copied(again), saved)


@pytest.mark.parametrize("monitored", [False, True])
def test_a_checkpoint_saved_in_validation_has_trainings_own_weights(monitored: bool, tmp_path) -> None:
    class Scored(WatchedGAN):
        def validation_step(self, batch, batch_idx) -> None:
            super().validation_step(batch, batch_idx)
            self.log("score", 1.0)

    path = Trajectory()
    saving = ModelCheckpoint(monitor="score" if monitored else None, save_on_train_epoch_end=False)
    _, checkpoint = checkpointed(tmp_path, GeneratorEMA(0.9), saving, path, gan=Scored())
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(state[f"generator.{name}"], value) for name, value in path.states[-1].items())


def test_a_checkpoint_that_somebody_saves_amid_validation_is_like_any_other(tmp_path) -> None:
    class Saving(Callback):
        def on_validation_epoch_end(self, trainer, pl_module) -> None:
            trainer.save_checkpoint(tmp_path / "amid.ckpt")

    ema, path = GeneratorEMA(0.9), Trajectory()
    evaluated(ema, Saving(), path)
    state = torch.load(tmp_path / "amid.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(state[f"generator.{name}"], value) for name, value in path.states[-1].items())
    again = WatchedGAN()
    toy_trainer(GeneratorEMA(0.9)).validate(again, one_batch(), ckpt_path=tmp_path / "amid.ckpt", verbose=False)
    assert all(torch.equal(again.seen[0][name], value) for name, value in ema.averages().items())


@pytest.mark.parametrize("sparse", [False, True])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(sparse: bool, tmp_path) -> None:
    def callbacks() -> list[Callback]:
        # Of the run's length nothing may depend: the first part is a run of one epoch.
        dynamic = DynamicSparsityCallback(
            0.25, interval=5, explore_interval=3, schedule="constant", bounds=(0.45, 0.55), seed=0
        )
        return [dynamic, SameDraws()] if sparse else [SameDraws()]

    whole = GeneratorEMA(0.9)
    expected = evaluated(*callbacks(), whole, epochs=2)
    _, path = checkpointed(tmp_path, *callbacks(), GeneratorEMA(0.9))
    ema = GeneratorEMA(0.9)
    resumed = WatchedGAN()
    toy_trainer(*callbacks(), ema, epochs=2).fit(resumed, toy_data(), one_batch(), ckpt_path=path)
    assert same(copied(resumed), copied(expected))
    assert same(ema.averages(), whole.averages())
    assert same(resumed.seen[-1], expected.seen[-1])


def test_an_earlier_checkpoint_is_evaluated_with_its_own_average(tmp_path) -> None:
    class Keeping(Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            if trainer.current_epoch == 0:
                self.averages = ema.averages()
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    ema, keeping = GeneratorEMA(0.9), Keeping()
    gan = WatchedGAN()
    seed_everything(0, verbose=False)
    trainer = toy_trainer(ema, keeping, epochs=2)
    trainer.fit(gan, toy_data())
    trainer.validate(gan, one_batch(), ckpt_path=tmp_path / "early.ckpt", verbose=False)
    (seen,) = gan.seen
    assert all(torch.equal(seen[name], value) for name, value in keeping.averages.items())
    assert not torch.equal(ema.averages()["0.weight"], torch.zeros(32, LATENT))


def test_a_checkpoint_of_another_generator_is_rejected(tmp_path) -> None:
    _, path = checkpointed(tmp_path, GeneratorEMA(0.9))
    gan = WatchedGAN()
    gan.generator = nn.Sequential(*gan.generator, nn.Tanh(), nn.Linear(PIXELS, PIXELS))
    gan.strict_loading = False
    with pytest.raises(ValueError, match=r"the saved averages are another network's: '5\.bias'"):
        toy_trainer(GeneratorEMA(0.9)).validate(gan, one_batch(), ckpt_path=path, verbose=False)


def test_a_run_may_begin_to_average_at_a_checkpoint_without_average(tmp_path) -> None:
    _, path = checkpointed(tmp_path)
    gan, trajectory = WatchedGAN(), Trajectory()
    toy_trainer(GeneratorEMA(0.999), trajectory, epochs=2).fit(gan, toy_data(), one_batch(), ckpt_path=path)
    assert len(trajectory.states) == 10
    torch.testing.assert_close(gan.seen[-1]["0.weight"], trajectory.mean("0.weight"), rtol=1e-5, atol=1e-6)


# ---- weights-only checkpoints --------------------------------------------------------------------------


def weights_only(folder: Path, *callbacks: Callback, **settings) -> tuple[ToyGAN, Path]:
    """A GAN, and its checkpoint as `ModelCheckpoint(save_weights_only=True)` saved it."""
    return checkpointed(folder, *callbacks, ModelCheckpoint(save_weights_only=True), **settings)


@pytest.mark.parametrize("evaluation", ["validate", "test", "predict"])
@pytest.mark.parametrize("name", [None, "generator"])
def test_a_weights_only_checkpoint_is_evaluated_with_its_average(evaluation: str, name: str | None, tmp_path) -> None:
    ema = GeneratorEMA(0.9, generator=name)
    gan, path = weights_only(tmp_path, ema, epochs=2)
    saved = torch.load(path, weights_only=True)
    assert "callbacks" not in saved
    assert same(saved["state_dict"], copied(gan))
    again = WatchedGAN()
    getattr(toy_trainer(GeneratorEMA(0.9, generator=name)), evaluation)(again, one_batch(), ckpt_path=path)
    (seen,) = again.seen
    assert all(torch.equal(seen[name], value) for name, value in ema.averages().items())
    assert not torch.equal(seen["0.weight"], gan.generator[0].weight)
    assert same(copied(again), saved["state_dict"])


def test_a_weights_only_checkpoint_saved_amid_validation_has_both_weights(tmp_path) -> None:
    class Saving(Callback):
        def on_validation_epoch_end(self, trainer, pl_module) -> None:
            trainer.save_checkpoint(tmp_path / "amid.ckpt", weights_only=True)

    ema, path = GeneratorEMA(0.9), Trajectory()
    evaluated(ema, Saving(), path)
    state = torch.load(tmp_path / "amid.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(state[f"generator.{name}"], value) for name, value in path.states[-1].items())
    again = WatchedGAN()
    toy_trainer(GeneratorEMA(0.9)).validate(again, one_batch(), ckpt_path=tmp_path / "amid.ckpt", verbose=False)
    assert all(torch.equal(again.seen[0][name], value) for name, value in ema.averages().items())


def test_two_averages_are_both_in_a_weights_only_checkpoint(tmp_path) -> None:
    emas = [GeneratorEMA(0.9), GeneratorEMA(0.5, generator="generator")]
    _, path = weights_only(tmp_path, *emas)
    again = [GeneratorEMA(0.9), GeneratorEMA(0.5, generator="generator")]
    for ema in again:
        toy_trainer(ema).validate(WatchedGAN(), one_batch(), ckpt_path=path, verbose=False)
    assert all(same(ema.averages(), other.averages()) for ema, other in zip(emas, again, strict=True))


class Own(WatchedGAN):
    def __init__(self) -> None:
        super().__init__()
        self.discriminator = nn.Sequential(nn.Linear(PIXELS, 32), nn.ReLU(), nn.Linear(32, 1))  # which can be pickled

    def on_save_checkpoint(self, checkpoint) -> None:
        checkpoint["mine"] = 3


def test_a_module_with_hooks_of_its_own_keeps_them_also_copied_and_pickled(tmp_path) -> None:
    gan = evaluated(GeneratorEMA(0.9), gan=Own())
    for other in (gan, copy.deepcopy(gan), pickle.loads(pickle.dumps(gan))):
        ema = GeneratorEMA(0.5)
        seed_everything(0, verbose=False)
        trainer = toy_trainer(ema)
        trainer.fit(other, toy_data())
        trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert saved["mine"] == 3
        assert same(saved["generator_averages"]["GeneratorEMA"]["averages"], ema.averages())
        assert saved["generator_averages"].keys() == {"GeneratorEMA"}
    alone: dict = {}
    copy.deepcopy(gan).on_save_checkpoint(alone)
    assert alone == {"mine": 3}
    toy_trainer().fit(gan, toy_data())  # without an average
    gan.trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert "generator_averages" not in torch.load(tmp_path / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("evaluation", ["validate", "test", "predict"])
def test_a_weights_only_checkpoint_without_an_average_is_rejected_in_evaluation(evaluation: str, tmp_path) -> None:
    _, path = weights_only(tmp_path)
    evaluate = getattr(toy_trainer(GeneratorEMA(0.9)), evaluation)
    with pytest.raises(ValueError, match="own weights and no average, so GeneratorEMA cannot evaluate it; leave out"):
        evaluate(WatchedGAN(), one_batch(), ckpt_path=path)


def test_a_checkpoint_with_another_average_is_rejected_in_evaluation(tmp_path) -> None:
    _, path = checkpointed(tmp_path, GeneratorEMA(0.9))
    with pytest.raises(ValueError, match=r"averages of GeneratorEMA, so GeneratorEMA\{'generator'"):
        toy_trainer(GeneratorEMA(0.9, generator="generator")).test(WatchedGAN(), one_batch(), ckpt_path=path)


def test_the_checkpoint_of_a_run_without_average_is_evaluated_with_its_own_weights_and_a_warning(tmp_path) -> None:
    other, path = checkpointed(tmp_path)
    gan, trainer = WatchedGAN(), toy_trainer(GeneratorEMA(0.9), epochs=2)
    trainer.fit(gan, toy_data())  # its average is of other weights
    with pytest.warns(UserWarning, match="of a run without GeneratorEMA: the generator's own weights are used"):
        trainer.test(gan, one_batch(), ckpt_path=path)
    assert same(gan.seen[-1], copied(other.generator))


# ---- how it begins and ends ----------------------------------------------------------------------------


@pytest.mark.parametrize("evaluation", ["validation", "test", "predict"])
@pytest.mark.parametrize("hook", ["step", "start"])
def test_an_exception_in_evaluation_gives_the_weights_back(evaluation: str, hook: str) -> None:
    seed_everything(0, verbose=False)
    ema, gan = GeneratorEMA(0.9), WatchedGAN()
    trainer = toy_trainer(ema)
    trainer.fit(gan, toy_data())
    own = copied(gan.generator)
    averaged = []

    def fails(*_, **__) -> None:
        averaged.append(not same(copied(gan.generator), own))
        raise RuntimeError("broken on purpose")

    setattr(gan, f"{evaluation}_step" if hook == "step" else f"on_{evaluation}_epoch_start", fails)
    run: Callable = getattr(trainer, evaluation.replace("validation", "validate"))
    with pytest.raises(RuntimeError, match="broken on purpose"):
        run(gan, one_batch())
    assert averaged == [True]
    assert same(copied(gan.generator), own)


def test_an_exception_in_the_evaluation_of_a_checkpoint_gives_the_weights_back(tmp_path) -> None:
    class Broken(WatchedGAN):
        def test_step(self, batch, batch_idx) -> None:
            super().test_step(batch, batch_idx)
            raise RuntimeError("broken on purpose")

    gan, path = checkpointed(tmp_path, GeneratorEMA(0.9))
    again = Broken()
    with pytest.raises(RuntimeError, match="broken on purpose"):
        toy_trainer(GeneratorEMA(0.9)).test(again, one_batch(), ckpt_path=path)
    assert not torch.equal(again.seen[0]["0.weight"], gan.generator[0].weight)
    assert same(copied(again), copied(gan))


def test_an_exception_in_validation_amid_fitting_gives_the_weights_back() -> None:
    class Broken(WatchedGAN):
        def validation_step(self, batch, batch_idx) -> None:
            super().validation_step(batch, batch_idx)
            if len(self.seen) == 2:
                raise RuntimeError("broken on purpose")

    gan, path = Broken(), Trajectory()
    with pytest.raises(RuntimeError, match="broken on purpose"):
        evaluated(GeneratorEMA(0.9), path, gan=gan)
    assert not same(gan.seen[-1], path.states[-1])
    assert same(copied(gan.generator), path.states[-1])


def hooks(trainer, gan: ToyGAN) -> int:
    modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in gan.modules())
    return modules + sum(len(o._optimizer_step_post_hooks) for o in trainer.optimizers)


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_gone_after_fitting_and_after_a_failure(fails: bool) -> None:
    optimizers = []

    class Kept(ToyGAN):
        def configure_optimizers(self):
            optimizers.extend(super().configure_optimizers())
            return optimizers

        def training_step(self, batch, batch_idx) -> None:
            super().training_step(batch, batch_idx)
            assert [len(o._optimizer_step_post_hooks) for o in optimizers] == [1, 0]
            if fails and batch_idx == 3:
                raise RuntimeError("broken on purpose")

    gan = Kept()
    if fails:
        with pytest.raises(RuntimeError, match="broken on purpose"):
            trained(GeneratorEMA(), gan=gan)
    else:
        trained(GeneratorEMA(), gan=gan)
    assert [len(o._optimizer_step_post_hooks) for o in optimizers] == [0, 0]


@pytest.mark.parametrize(
    ("names", "given"), [(("netG", "netD"), None), (("G", "D"), None), (("maker", "judge"), "maker")]
)
def test_the_generator_is_found_by_usual_and_by_given_names(names: tuple[str, str], given: str | None) -> None:
    gan, path = WatchedGAN(names), Trajectory()
    evaluated(GeneratorEMA(0.999, generator=given), path, gan=gan)
    torch.testing.assert_close(gan.seen[-1]["0.weight"], path.mean("0.weight"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "no generator was found in WatchedGAN"),
        ("net.G", "generator='net.G' .*WatchedGAN.* maker, judge"),
    ],
)
def test_a_generator_that_is_not_found_stops_the_run(given: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluated(GeneratorEMA(generator=given), gan=WatchedGAN(("maker", "judge")))


def test_a_generator_without_an_optimizer_is_rejected() -> None:
    class Half(WatchedGAN):
        def configure_optimizers(self):
            return [Adam([self.generator[0].weight]), Adam(self.discriminator.parameters())]

    with pytest.raises(ValueError, match=r"no optimizer updates '0\.bias'"):
        evaluated(GeneratorEMA(), gan=Half())


def test_a_frozen_part_of_the_generator_needs_no_optimizer() -> None:
    class Frozen(WatchedGAN):
        def __init__(self) -> None:
            super().__init__()
            self.generator[0].requires_grad_(False)

        def configure_optimizers(self):
            return [Adam(self.generator[1:].parameters()), Adam(self.discriminator.parameters())]

    gan = Frozen()
    frozen = copied(gan.generator[0])
    evaluated(GeneratorEMA(0.9), gan=gan)
    assert torch.equal(gan.seen[-1]["0.weight"], frozen["weight"])
    assert not torch.equal(gan.seen[-1]["3.weight"], gan.generator[3].weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.0}, r"decay=1.0 must be in \[0, 1\)"),
        ({"decay": -0.5}, r"decay=-0.5 must be in \[0, 1\)"),
        ({"buffers": "keep"}, "buffers='keep' is unknown; allowed are average, copy"),
    ],
)
def test_bad_arguments_are_rejected_at_once(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeneratorEMA(**arguments)


def test_averages_can_be_read_once_there_is_a_run() -> None:
    ema = GeneratorEMA(0.9)
    assert ema.averages() == {}
    trained(ema)
    assert ema.averages()["0.weight"].shape == (32, LATENT)


def test_fitting_resumes_where_it_ended() -> None:
    ema, path, gan = GeneratorEMA(0.999), Trajectory(), WatchedGAN()
    trained(ema, path, gan=gan)
    toy_trainer(ema, path, epochs=1).fit(gan, toy_data())
    assert len(path.states) == 20
    torch.testing.assert_close(ema.averages()["0.weight"], path.mean("0.weight"), rtol=1e-5, atol=1e-6)


def test_training_may_follow_an_evaluation() -> None:
    ema, path, gan = GeneratorEMA(0.999), Trajectory(), WatchedGAN()
    trainer = toy_trainer(ema, path)
    trainer.validate(gan, one_batch(), verbose=False)
    trainer.fit(gan, toy_data())
    assert len(path.states) == 10
    torch.testing.assert_close(ema.averages()["0.weight"], path.mean("0.weight"), rtol=1e-5, atol=1e-6)


def test_another_gan_gets_an_average_of_its_own() -> None:
    ema, path = GeneratorEMA(0.999), Trajectory()
    trained(ema)
    second = WatchedGAN()
    trained(ema, path, gan=second)
    torch.testing.assert_close(ema.averages()["0.weight"], path.mean("0.weight"), rtol=1e-5, atol=1e-6)


def test_weights_that_were_replaced_before_training_are_the_ones_evaluated() -> None:
    gan = WatchedGAN()
    trainer = toy_trainer(GeneratorEMA())
    trainer.validate(gan, one_batch(), verbose=False)
    other = copied(WatchedGAN())
    gan.load_state_dict(other)
    trainer.validate(gan, one_batch(), verbose=False)
    assert torch.equal(gan.seen[1]["0.weight"], other["generator.0.weight"])


def test_the_average_follows_a_module_that_is_moved() -> None:
    # Like moves between devices, conversions replace buffers by new tensors, and parameters' data.
    seed_everything(0, verbose=False)
    ema, gan = GeneratorEMA(0.999), WatchedGAN()
    trainer = toy_trainer(ema)
    trainer.fit(gan, toy_data())
    averages, own = ema.averages(), copied(gan)
    gan.double().float()
    trainer.validate(gan, one_batch(), verbose=False)
    assert all(torch.equal(gan.seen[0][name], value) for name, value in averages.items())
    assert same(copied(gan), own)
    # Training averages the present weights from here on.
    trainer.fit_loop.max_epochs = 2
    trainer.fit(gan, toy_data(), one_batch())
    assert not torch.equal(ema.averages()["1.running_mean"], averages["1.running_mean"])


def test_the_callback_can_be_copied_before_it_runs() -> None:
    ema = copy.deepcopy(GeneratorEMA(0.9))
    trained(ema)
    assert ema.averages()


@pytest.mark.parametrize("frozen", [False, True])
def test_steps_of_two_optimizers_of_the_generator_are_one_update(frozen: bool) -> None:
    class Parts(ToyGAN):
        def configure_optimizers(self):
            parts = (self.generator[:2], self.generator[2:], self.discriminator)
            return [SGD(part.parameters(), lr=1e-2) for part in parts]

        def on_train_start(self) -> None:
            self.generator.requires_grad_(not frozen)

        def on_train_batch_start(self, batch, batch_idx) -> None:
            self.generator.requires_grad_(True)

        def optimizers(self):
            first, last, discriminator = super().optimizers()
            joined = SimpleNamespace(zero_grad=self.generator.zero_grad, step=lambda: (first.step(), last.step()))
            return joined, discriminator

    averaged, values = GeneratorEMA(0.999), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, gan, *_) -> None:
            values.append(gan.generator[3].weight.detach().clone())

    trained(averaged, Watch(), gan=Parts())
    assert averaged.state_dict()["updates"] == len(values) == 10
    torch.testing.assert_close(averaged.averages()["3.weight"], torch.stack(values).mean(0))
