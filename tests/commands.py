"""The command in tests: parsed only, or run for seconds."""

from lightning_ddst import cli


class ParsedOnly(cli.SparseGANCLI):
    """Makes nothing of what was parsed."""

    def instantiate_classes(self):
        pass


def parsed(monkeypatch, *args):
    """The command with the arguments of ``fit``; nothing is made."""
    monkeypatch.setattr(cli, "SparseGANCLI", ParsedOnly)
    return cli.make_cli(args, run=False)


TINY = """
model:
  class_path: lightning_ddst.GANModule
  init_args:
    generator: {class_path: lightning_ddst.models.SmallGenerator, init_args: {width: 4}}
    discriminator: {class_path: lightning_ddst.models.SmallDiscriminator, init_args: {width: 2}}
data: {class_path: lightning_ddst.data.DigitsDataModule, init_args: {batches_per_epoch: 20}}
sparsity: {generator_density: 0.1, interval: 10}
trainer:
  accelerator: cpu
  max_epochs: 1
  log_every_n_steps: 5
  num_sanity_val_steps: 0
  enable_progress_bar: false
"""
"""A configuration of 20 generator updates; append more arguments of the trainer."""
