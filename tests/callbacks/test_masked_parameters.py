"""Which parameters of a user's networks are masked, and which share of them: found, declared, or said to stay dense."""

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from toys import LATENT, PIXELS, OtherLayersGAN, ToyGAN, toy_data, toy_trainer, trained

from lightning_ddst import DynamicSparsityCallback, GeneratorEMA


class Projection(nn.Module):
    """A layer whose weight has a name that says nothing; its shape is (inputs, outputs)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.projection = nn.Parameter(torch.randn(inputs, outputs) * inputs**-0.5)

    def forward(self, x):
        return x @ self.projection


class ProjectedGAN(ToyGAN):
    """32 * 16 of the generator's 8 * 32 + 32 * 16 weights have such a name."""

    def __init__(self):
        super().__init__()
        self.generator[3] = Projection(32, PIXELS)


class Said:
    """The weights that can be masked in the summary, and the warnings of one attachment."""

    def __init__(self, gan, **arguments):
        self.sparsity = DynamicSparsityCallback(0.25, **arguments)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trained(self.sparsity, gan=gan)
        rows = {row[0]: row[1:] for block in self.sparsity.summary().blocks for row in block}
        self.weights = list(rows["weights"])
        self.warnings = [str(each.message) for each in caught if "maskable" in str(each.message)]


def test_a_warning_names_weights_that_stay_dense():
    said = Said(ProjectedGAN())
    (warning,) = said.warnings
    assert said.weights == ["256 maskable (33.3%)", "544 maskable (100.0%)"]  # of 768 and 544
    assert "33.3% of the generator's" in warning
    assert "'generator.3.projection' (32, 16)" in warning
    assert list(said.sparsity.masks("generator")) == ["generator.0.weight"]


def test_a_declared_parameter_is_masked_and_nothing_is_missing():
    said = Said(ProjectedGAN(), masked_parameters={"generator.*.projection": (1, 0)})
    assert said.weights[0] == "768 maskable (100.0%)"
    assert said.warnings == []
    assert {name: mask.shape for name, mask in said.sparsity.masks("generator").items()} == {
        "generator.0.weight": (32, 8),
        "generator.3.projection": (32, 16),
    }
    assert said.sparsity.networks()["generator"].active == 192  # a quarter of 768


@pytest.mark.parametrize("pattern", ["generator.3", "generator.3.projection", "Projection"])
def test_weights_that_are_to_stay_dense_do_not_count_as_missing(pattern):
    said = Said(ProjectedGAN(), dense_layers=[pattern])
    assert said.weights[0] == "256 maskable (100.0%)"
    assert said.warnings == []
    assert list(said.sparsity.masks("generator")) == ["generator.0.weight"]


def test_a_frozen_weight_is_named_as_frozen():
    gan = ToyGAN()
    gan.generator[3].weight.requires_grad_(False)
    (warning,) = Said(gan).warnings
    assert "'generator.3.weight' (16, 32) (frozen)" in warning


def test_the_norms_of_weight_norm_are_no_weights():
    gan = OtherLayersGAN()
    said = Said(gan)
    assert [share.partition(" (")[2] for share in said.weights] == ["100.0%)", "100.0%)"]
    assert said.warnings == []
    assert said.sparsity.networks()["generator"].total == 16 * 8 + 4 * 8 * (4 + 8) + 16 * 32


@pytest.mark.parametrize("granularity", ["channel", "2:4"])
def test_layers_that_a_granularity_leaves_dense_are_named(granularity):
    gan = ToyGAN()
    last = parametrizations.weight_norm(nn.Linear(PIXELS, PIXELS), dim=1)  # a norm for every input
    gan.generator = nn.Sequential(nn.Linear(LATENT, 32), nn.ReLU(), nn.Linear(32, PIXELS), nn.ReLU(), last)
    densities = {"generator_density": 0.5, "discriminator_density": 0.5}
    sparsity = DynamicSparsityCallback(method="static", granularity=granularity, **densities)
    match = r"only 75\.0% .* maskable.*'generator\.4\.parametrizations\.weight\.original1' \(16, 16\)"  # 768 of 1024
    with pytest.warns(UserWarning, match=match):
        trained(sparsity, gan=gan)
    assert list(sparsity.masks("generator")) == ["generator.0.weight", "generator.2.weight"]


class SpareLayer(nn.Linear):
    """A layer that training does not use."""

    def forward(self, x):
        return x


@pytest.mark.parametrize(("dense_layers", "count"), [([], 1), (["generator.4"], 0)])
def test_the_warning_of_a_postponed_change_names_what_dense_layers_takes(dense_layers, count, recwarn):
    gan = ToyGAN()
    gan.generator.append(SpareLayer(PIXELS, PIXELS))
    trained(DynamicSparsityCallback(0.25, explore_interval=3, dense_layers=dense_layers), gan=gan)
    messages = [str(warning.message) for warning in recwarn if "postponed" in str(warning.message)]
    assert len(messages) == count
    assert all(" 'generator.4.weight'. " in message for message in messages)


def test_a_layer_that_stays_dense_may_be_computed_in_any_way():
    gan = ToyGAN()
    parametrizations.orthogonal(gan.generator[3])
    with pytest.raises(ValueError, match=r"generator .*layer '3' .*cannot be masked"):
        trained(DynamicSparsityCallback(0.25), gan=gan)
    sparsity = DynamicSparsityCallback(0.25, dense_layers=["generator.3"])
    trained(sparsity, gan=gan)
    assert list(sparsity.masks("generator")) == ["generator.0.weight"]


def test_a_declaration_that_matches_nothing_is_rejected():
    sparsity = DynamicSparsityCallback(0.25, masked_parameters={"*.projector": (0, 1)})
    with pytest.raises(ValueError, match=r"masked_parameters: '\*\.projector' matches no parameter"):
        trained(sparsity, gan=ProjectedGAN())


def test_a_run_keeps_its_declared_parameters(tmp_path):
    def fit(declared, ckpt_path=None):
        sparsity = DynamicSparsityCallback(0.25, masked_parameters=declared)
        settings = {"epochs": 1 + (ckpt_path is not None), "folder": tmp_path, "logger": False}
        saving = ModelCheckpoint(tmp_path, filename="last")
        toy_trainer(sparsity, saving, **settings).fit(ProjectedGAN(), toy_data(), ckpt_path=ckpt_path)
        return sparsity

    fit({"generator.3.projection": (1, 0)})
    with pytest.raises(ValueError, match=r"masked_parameters=None: the run of the checkpoint has masked_parameters="):
        fit(None, tmp_path / "last.ckpt")
    assert len(fit({"generator.3.projection": (1, 0)}, tmp_path / "last.ckpt").masks("generator")) == 2


def test_the_average_of_a_generator_with_other_layers_is_as_sparse_as_the_generator():
    class Evaluated(OtherLayersGAN):
        def validation_step(self, batch, batch_idx):
            networks = sparsity.networks()
            for name, weight in networks["generator"].weights.items():
                effective = weight.effective()
                assert effective.isfinite().all()
                assert torch.equal(effective != 0, networks["generator"].masks[name] & (weight.parameter != 0))
            self.evaluations = getattr(self, "evaluations", 0) + 1

    sparsity = DynamicSparsityCallback(0.25, method="sdst", explore_interval=3)
    gan = Evaluated()
    toy_trainer(sparsity, GeneratorEMA(0.9), epochs=2, num_sanity_val_steps=0).fit(gan, toy_data(), toy_data(1))
    assert gan.evaluations == 2


def test_attention_and_recurrent_layers_train_with_their_masks():
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.cell = nn.MultiheadAttention(4, 2, batch_first=True), nn.GRUCell(4, 8)
            self.write = nn.Linear(8, PIXELS)

        def forward(self, z):
            steps = z.unflatten(1, (2, LATENT // 2))
            steps, _ = self.read(steps, steps, steps)
            state = None
            for step in steps.unbind(1):
                state = self.cell(step, state)
            return F.leaky_relu(self.write(state))

    gan = ToyGAN()
    gan.generator = Sequence()
    sparsity = DynamicSparsityCallback(0.3, method="sdst", explore_interval=2)
    trained(sparsity, gan=gan, epochs=2)
    masks = sparsity.masks("generator")
    assert [name.removeprefix("generator.") for name in masks] == [
        "read.in_proj_weight",
        "read.out_proj.weight",
        "cell.weight_ih",
        "cell.weight_hh",
        "write.weight",
    ]
    parameters = dict(gan.named_parameters())
    assert not any(parameters[name][~mask].any() for name, mask in masks.items())
    assert sparsity.networks()["generator"].coverage > 0.4


def test_a_dense_run_needs_no_warning():
    assert Said(ProjectedGAN(), method="dense").warnings == []
