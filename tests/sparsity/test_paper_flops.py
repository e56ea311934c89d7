import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from lightning_ddst.models import SNGANDiscriminator, SNGANGenerator
from lightning_ddst.sparsity import published_flops, published_training_flops


def test_one_image_by_hand():
    network = nn.Sequential(
        spectral_norm(nn.Conv2d(3, 4, 3, padding=1)),  # 108 weights and 4 biases at 25 positions
        nn.BatchNorm2d(4),  # 8 at 25
        nn.ConvTranspose2d(4, 2, 2, stride=2),  # left out
        nn.BatchNorm2d(2, affine=False),
        nn.Flatten(),
        nn.Linear(200, 6, bias=False),  # 1,200
    )
    assert published_flops(network, torch.zeros(1, 3, 5, 5)) == 25 * (108 + 4 + 8) + 1_200
    densities = {"0.parametrizations.weight.original": 0.5, "5.weight": 0.1}
    assert published_flops(network, torch.zeros(1, 3, 5, 5), densities=densities) == 25 * (54 + 4 + 8) + 120
    assert network.training
    assert not network[1].num_batches_tracked


def test_densities_of_missing_layers_are_rejected():
    with pytest.raises(ValueError, match=r"'generator.weight' is no maskable weight of Linear"):
        published_flops(nn.Linear(2, 3), torch.zeros(1, 2), densities={"generator.weight": 0.1})


def test_modules_that_return_several_tensors_and_tied_weights():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.tied, self.free = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), nn.Linear(3, 2)
            self.tied.weight = self.embedding.weight

        def forward(self, x):
            return self.tied(x), self.free(x)

    assert published_flops(Two(), torch.zeros(1, 3)) == 15 + 6 + 2


def test_groups_are_ignored():
    network = nn.Conv2d(4, 8, 1, groups=2, bias=False)  # 16 weights, counted as 32
    assert published_flops(network, torch.zeros(1, 4, 3, 3)) == 32 * 9


def test_a_run_by_hand():
    # Generator: 2 * 3 images forward, 5 forward and backward. Discriminator, twice over: 6 real ones and 5 forward.
    training = published_training_flops(
        10.0, 7.0, updates=2, discriminator_steps=2, batch_size=3, generator_batch_size=5
    )
    assert training == 2 * (10 * (6 + 15) + 7 * 2 * (18 + 5))


def test_the_published_number_of_dense_sngan_on_cifar10():
    generator = published_flops(SNGANGenerator(32), torch.zeros(1, 128))
    discriminator = published_flops(SNGANDiscriminator(32), torch.zeros(1, 3, 32, 32))
    assert (generator, discriminator) == (1_683_553_280, 272_498_816)
    assert published_training_flops(generator, discriminator, updates=100_000) == pytest.approx(2.67e17, rel=2e-3)
