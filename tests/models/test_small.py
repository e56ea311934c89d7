import pytest
import torch
from torch import nn

from lightning_ddst.models import SmallDiscriminator, SmallGenerator
from lightning_ddst.sparsity import maskable_weights


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 16, 32])
def test_shapes(size: int, channels: int, classes: int | None) -> None:
    labels = None if classes is None else torch.tensor([0, 2, 1, 0, 2])
    generator = SmallGenerator(size, channels, width=4, latent_dim=6, num_classes=classes)
    images = generator(torch.randn(5, 6), labels)
    assert images.shape == (5, channels, size, size)
    assert images.dtype == torch.float32
    discriminator = SmallDiscriminator(size, channels, width=4, num_classes=classes)
    assert discriminator(images, labels).shape == (5,)


def test_sixty_four_pixels_work_too() -> None:
    images = SmallGenerator(64, width=2)(torch.randn(2, 64))
    assert images.shape == (2, 1, 64, 64)
    assert SmallDiscriminator(64, width=2)(images).shape == (2,)


def test_the_default_networks_fit_the_digits() -> None:
    generator, discriminator = SmallGenerator(), SmallDiscriminator()
    images = generator(torch.randn(4, generator.latent_dim))
    assert images.shape == (4, 1, 8, 8)
    assert discriminator(images).shape == (4,)
    # 64*128*4 + 128*64*16 + 64*32*16 + 32*9, and 32*9 + 32*64*16 + 64*128*16 + 512.
    assert sum(weight.parameter.numel() for weight in maskable_weights(generator)) == 196_896
    assert sum(weight.parameter.numel() for weight in maskable_weights(discriminator)) == 164_640


def test_images_stay_in_range_whatever_the_weights() -> None:
    generator = SmallGenerator(8, width=4)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.mul_(100)
    images = generator(100 * torch.randn(16, 64))
    assert images.min() >= -1
    assert images.max() <= 1
    assert images.abs().max() > 0.99  # the weights do reach the ends


def test_width_bounds_the_channels() -> None:
    # Towards 2x2 the channels double with every halving, to at most 4 times the width.
    discriminator = [m.out_channels for m in SmallDiscriminator(32, width=4).modules() if isinstance(m, nn.Conv2d)]
    assert discriminator == [4, 8, 16, 16, 16]
    generator = [m.in_channels for m in SmallGenerator(32, width=4).modules() if hasattr(m, "in_channels")]
    assert generator == [16, 16, 16, 8, 4]


@pytest.mark.parametrize("network", [SmallGenerator, SmallDiscriminator])
@pytest.mark.parametrize("size", [-8, 0, 1, 4, 7, 12, 28, 33])
def test_sizes_that_are_no_power_of_two_are_rejected(network: type[nn.Module], size: int) -> None:
    with pytest.raises(ValueError, match=rf"image_size={size} must be a power of 2, at least 8"):
        network(image_size=size)


def test_images_depend_on_the_labels_of_a_conditional_generator() -> None:
    z = torch.randn(4, 64)
    generator = SmallGenerator(8, width=4, num_classes=2).eval()
    assert not torch.allclose(generator(z, torch.zeros(4, dtype=int)), generator(z, torch.ones(4, dtype=int)))


def test_labels_of_an_unconditional_network_are_rejected() -> None:
    for network, inputs in ((SmallGenerator(8, width=4), (2, 64)), (SmallDiscriminator(8, width=4), (2, 1, 8, 8))):
        with pytest.raises(ValueError, match=rf"labels were given to {type(network).__name__}.*num_classes=None"):
            network(torch.randn(inputs), torch.zeros(2, dtype=int))


def test_a_conditional_discriminator_projects_on_the_label() -> None:
    images = torch.rand(4, 1, 8, 8)
    discriminator = SmallDiscriminator(8, width=4, num_classes=3).eval()
    features = discriminator.layers(images)
    labels = torch.tensor([0, 2, 1, 2])
    expected = discriminator.score(features)[:, 0] + (discriminator.embedding.weight[labels] * features).sum(1)
    torch.testing.assert_close(discriminator(images, labels), expected)


def test_every_weight_of_the_discriminator_has_spectral_norm_one() -> None:
    torch.manual_seed(0)  # weights whose two largest singular values are close would take more iterations
    discriminator = SmallDiscriminator(16, width=4, num_classes=3)
    images, labels = torch.rand(8, 1, 16, 16), torch.randint(3, (8,))
    for _ in range(200):
        discriminator(images, labels)  # a power iteration each
    discriminator.eval()
    layers = [m for m in discriminator.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.Embedding)]
    assert len(layers) == 6  # one at full size, 3 halvings, the score and the projection
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)
    names = {name for name, parameter in discriminator.named_parameters() if parameter.dim() > 1}
    assert len(names) == 6
    assert all(name.endswith("parametrizations.weight.original") for name in names)
