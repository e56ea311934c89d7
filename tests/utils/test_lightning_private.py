import ast
from pathlib import Path

import pytest
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset
from toys import ToyGAN, toy_data, toy_trainer

import lightning_ddst
from lightning_ddst.utils import lightning_private

PACKAGE = Path(lightning_ddst.__file__).parent
PRIVATE = {
    *("_apply_batch_transfer_handler", "_call_batch_hook", "_on_before_batch_transfer"),  # LightningModule
    *("_active_loop", "_evaluation_loop", "_run", "_run_stage", "_run_train", "_run_sanity_check"),  # Trainer
    *("_accelerator_connector", "_callback_connector", "_checkpoint_connector", "_data_connector"),
    *("_logger_connector", "_signal_connector"),
    *("_combined_loader", "_data_fetcher", "_data_source", "_restart_stage", "_restarting", "_results"),  # loops
    *("restarted_mid_epoch", "restarted_on_epoch_end", "restarted_on_epoch_start", "restarted_on_last"),
    *("resumed_on_epoch_end", "restarted_on_train_batch_end"),
    *("_ddp_kwargs", "_forward_redirection", "_lightning_module", "_lightning_optimizers"),  # strategies
    *("_load_state_dicts", "_state_dicts"),  # CombinedLoader
    *("_generate_state_key", "_legacy_state_key"),  # Callback
    *("_on_after_step", "_on_before_step", "_optimizer", "_strategy"),  # LightningOptimizer
}


def private_uses(source: str) -> list[str]:
    """Private attributes of Lightning, and imports of its private modules and names; not a class's own attributes."""
    uses = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in PRIVATE and f"self.{node.attr} = " not in source:
            uses.append(node.attr)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("lightning.", "pytorch_lightning")):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            uses += [part for part in parts if part.startswith("_")]
    return uses


def test_the_search_finds_what_it_looks_for():
    source = "from lightning.pytorch.loops.fit_loop import _FitLoop\ntrainer.fit_loop._data_fetcher\nself._mine\n"
    assert private_uses(source) == ["_FitLoop", "_data_fetcher"]
    assert set(private_uses((PACKAGE / "utils/lightning_private.py").read_text())) == {
        *("_generate_state_key", "_ddp_kwargs", "_evaluation_loop", "_combined_loader", "_on_before_batch_transfer"),
        *("restarted_mid_epoch", "restarted_on_last", "_data_fetcher", "_strategy", "_load"),
    }


@pytest.mark.parametrize("path", [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")])
def test_no_other_file_uses_private_attributes_of_lightning(path):
    if path != "utils/lightning_private.py":
        assert private_uses((PACKAGE / path).read_text()) == []


# ---- with a real Trainer ----------------------------------------------------------------------------


class At(Callback):
    """Calls a function at one hook, and keeps what it returns."""

    def __init__(self, hook, function):
        self.seen = []
        setattr(self, hook, lambda trainer, *_: self.seen.append(function(trainer)))


def test_state_keys_of_two_callbacks_of_a_class_differ():
    keys = [lightning_private.state_key(ModelCheckpoint(), name=name) for name in ("a", "b")]
    assert keys == ["ModelCheckpoint{'name': 'a'}", "ModelCheckpoint{'name': 'b'}"]
    assert lightning_private.state_key_of("ModelCheckpoint", name="a") == keys[0]


@pytest.mark.parametrize(("given", "expected"), [({}, True), ({"find_unused_parameters": False}, False)])
def test_an_argument_of_ddp_is_set_unless_the_user_did(given, expected):
    strategy = DDPStrategy(**given)
    trainer = toy_trainer(strategy=strategy)
    lightning_private.set_ddp_default(trainer, "find_unused_parameters", True)
    assert strategy._ddp_kwargs == {"find_unused_parameters": expected}


def test_the_strategy_of_fabrics_wrappers():
    fabric = Fabric(accelerator="cpu", devices=1)
    network = nn.Linear(1, 1)
    optimizer = SGD(network.parameters())
    for plain, wrapped in zip((network, optimizer), fabric.setup(network, optimizer), strict=True):
        assert lightning_private.fabric_strategy(wrapped) is fabric.strategy
        assert lightning_private.fabric_strategy(plain) is None


def test_other_strategies_are_left_alone():
    lightning_private.set_ddp_default(toy_trainer(), "find_unused_parameters", True)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_the_loaders_of_an_evaluation_are_its_own_even_after_a_fit(stage):
    at = At(f"on_{'validation' if stage == 'validate' else stage}_epoch_end", lightning_private.evaluation_loaders)
    module, trainer = Evaluated(), toy_trainer(at, epochs=1)
    trainer.fit(module, toy_data(), [toy_data(), toy_data()])
    loader = toy_data()
    getattr(trainer, stage)(module, loader, verbose=False)
    assert at.seen[-1] == [loader]
    assert stage == "test" or [len(loaders) for loaders in at.seen] == [2, 2, 1]  # the sanity check, fit, validate


class Evaluated(ToyGAN):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        pass


def test_train_loaders():
    loader = toy_data()
    at = At("on_train_start", lightning_private.train_loaders)
    trainer = toy_trainer(at, epochs=1)
    assert lightning_private.train_loaders(trainer) == []
    trainer.fit(ToyGAN(), loader)
    assert at.seen == [[loader]]


def test_a_batch_passes_all_hooks_around_its_transfer():
    class Hooked(LightningModule):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [*batch, f"before {dataloader_idx}"]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [*batch, f"after {dataloader_idx}"]

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

    at = At("on_validation_epoch_end", lambda trainer: lightning_private.transfer_batch(trainer, [1], 0))
    toy_trainer(at).validate(Hooked(), toy_data(), verbose=False)
    assert at.seen == [[1, "before 0", "after 0"]]


class Counted(DataLoader):
    """Counts its iterators: each draws from the random state."""

    iterators = 0

    def __iter__(self):
        self.iterators += 1
        return super().__iter__()


class Validated(Evaluated):
    def val_dataloader(self):
        return toy_data()


@pytest.mark.parametrize(
    ("hook", "batch", "mid", "renewed"),
    [
        ("on_train_batch_end", 0, True, 0),
        ("on_train_batch_end", 1, False, 1),  # the last one
        ("on_validation_end", 1, False, 0),
        ("on_train_epoch_end", 1, False, 1),
    ],
)
def test_a_fit_resumes_in_the_middle_or_at_the_end_of_an_epoch(tmp_path, hook, batch, mid, renewed):
    def data():
        return Counted(TensorDataset(toy_data().dataset.tensors[0][:16]), shuffle=True, batch_size=8)

    def save(trainer):
        if not trainer.sanity_checking and trainer.fit_loop.epoch_loop.batch_progress.current.processed == batch + 1:
            trainer.save_checkpoint(tmp_path / "saved.ckpt")

    toy_trainer(At(hook, save), epochs=1).fit(Validated(), data())
    loader = data()

    def renew(trainer):
        before = loader.iterators
        lightning_private.renew_train_iterator(trainer)
        return lightning_private.resumes_mid_epoch(trainer), loader.iterators - before

    at = At("on_train_start", renew)
    toy_trainer(at, epochs=2).fit(Validated(), loader, ckpt_path=tmp_path / "saved.ckpt")
    assert at.seen == [(mid, renewed)]
