"""Lightning's counting of steps with two per batch, as in docs/attach.md."""

from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from toys import ToyGAN, toy_data, toy_trainer

from lightning_ddst import DynamicSparsityCallback


def test_max_steps_counts_both_optimizers(tmp_path) -> None:
    sparsity = DynamicSparsityCallback(0.3)
    trainer = toy_trainer(sparsity, epochs=-1, max_steps=12)
    trainer.fit(ToyGAN(), toy_data())
    assert trainer.global_step == 12
    assert sparsity.generator_updates == 6
    assert sparsity.plan.updates == 6


def test_checkpoints_are_made_at_multiples_of_the_steps_a_batch(tmp_path) -> None:
    for every, saved in ((5, [10, 20]), (4, [4, 8, 12, 16, 20])):
        folder = tmp_path / str(every)
        checkpoints = ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1)
        trainer = toy_trainer(DynamicSparsityCallback(0.3), checkpoints, folder=folder)
        trainer.fit(ToyGAN(), toy_data())
        assert sorted(int(path.stem.removeprefix("step=")) for path in folder.glob("*.ckpt")) == saved


def test_torchs_own_optimizers_are_not_counted_and_nothing_is_saved(tmp_path) -> None:
    class Raw(ToyGAN):
        def optimizers(self, use_pl_optimizer: bool = True) -> Any:
            return super().optimizers(use_pl_optimizer=False)

    sparsity = DynamicSparsityCallback(0.3)
    checkpoints = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1)
    trainer = toy_trainer(sparsity, checkpoints, epochs=2, max_steps=4, folder=tmp_path)
    trainer.fit(Raw(), toy_data())
    assert trainer.global_step == 0
    assert sparsity.generator_updates == 20
    assert not list(tmp_path.glob("*.ckpt"))
