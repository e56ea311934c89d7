import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_ddst.models import SNGANDiscriminator, SNGANGenerator
from lightning_ddst.sparsity import MaskedNetwork, maskable_weights


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def figures(network: nn.Module, *shape: int) -> tuple[int, int, int]:
    """Parameters, maskable weights, and operations of one forward pass, which computes nothing."""
    network.eval().to("meta")
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, *shape, device="meta"))
    maskable = sum(weight.parameter.numel() for weight in maskable_weights(network))
    return sum(parameter.numel() for parameter in network.parameters()), maskable, counter.get_total_flops()


@pytest.mark.parametrize(
    ("size", "generator", "discriminator"),
    [
        # Miyato et al. 2018, tables 4 and 5. Equal to those of the networks in the code of "Balanced Training
        # for Sparse GANs" (lottery_sngan.py, resnet.py), instantiated; outputs are equal for equal weights.
        (32, (4_276_739, 4_266_752, 3_362_258_944), (1_053_824, 1_052_544, 544_145_664)),
        # There the score has a bias, one parameter more, and the last block halves, which changes no count.
        (48, (4_878_083, 4_855_488, 1_654_751_232), (19_542_720, 19_536_768, 1_235_019_776)),
    ],
)
def test_the_default_networks_are_the_published_ones(
    size: int, generator: tuple[int, int, int], discriminator: tuple[int, int, int]
) -> None:
    assert figures(SNGANGenerator(size), 128) == generator
    assert figures(SNGANDiscriminator(size), 3, size, size) == discriminator


def test_the_generator_for_cifar_counted_by_hand() -> None:
    parameters, maskable, flops = figures(SNGANGenerator(), 128)
    dense, block, image = 128 * 4 * 4 * 256, (9 + 9 + 1) * 256 * 256, 9 * 256 * 3
    assert maskable == dense + 3 * block + image
    biases, norms = 4 * 4 * 256 + 3 * 3 * 256 + 3, (3 * 2 + 1) * 2 * 256
    assert parameters == maskable + biases + norms
    assert flops == 2 * (dense + block * (8**2 + 16**2 + 32**2) + image * 32**2)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [32, 48])
def test_shapes_and_range_with_few_channels(size: int, channels: int) -> None:
    generator = SNGANGenerator(size, channels, width=2, latent_dim=5)
    assert generator.latent_dim == 5
    images = generator(10 * torch.randn(4, 5))
    assert images.shape == (4, channels, size, size)
    assert images.abs().max() <= 1
    assert SNGANDiscriminator(size, channels, width=2)(images).shape == (4,)


def test_width_scales_every_map() -> None:
    def widths(network: nn.Module) -> list[int]:
        return [module.in_channels for name, module in network.named_modules() if name.endswith("conv1")]

    assert widths(SNGANGenerator(32, width=3)) == [3, 3, 3]
    assert widths(SNGANGenerator(48, width=3)) == [24, 12, 6]
    assert widths(SNGANDiscriminator(32, width=3)) == [3, 3, 3, 3]
    assert widths(SNGANDiscriminator(48, width=3)) == [3, 3, 6, 12, 24]


@pytest.mark.parametrize("size", [32, 48])
def test_gradients_reach_every_parameter(size: int) -> None:
    generator, discriminator = SNGANGenerator(size, width=2), SNGANDiscriminator(size, width=2)
    discriminator(generator.eval()(torch.randn(8, 128))).sum().backward()  # BatchNorm cancels biases in training
    for network in (generator, discriminator):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_weights_are_drawn_by_glorot() -> None:
    layers = SNGANGenerator(48, width=16).layers
    bounds = {layers[0]: 6 / (128 + 36 * 128), layers[2].shortcut: 6 / (128 + 64), layers[-2]: 6 / 9 / (16 + 3)}
    bounds |= {layers[2].conv1: 2 * 6 / 9 / (128 + 64), layers[2].conv2: 2 * 6 / 9 / (64 + 64)}
    for layer, bound in bounds.items():
        assert layer.weight.abs().max().item() == pytest.approx(bound**0.5, rel=0.02)
        assert not layer.bias.any()


@pytest.mark.parametrize("size", [32, 48])
def test_every_layer_of_the_discriminator_has_spectral_norm_one(size: int) -> None:
    discriminator, images = SNGANDiscriminator(size, width=2), torch.rand(1, 3, size, size)
    for _ in range(50):
        discriminator(images)  # a power iteration each
    discriminator.eval()
    layers = [module for module in discriminator.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == {32: 4 * 2 + 2 + 1, 48: 5 * 3 + 1}[size]
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_the_sum_over_positions_is_scored() -> None:
    discriminator, images = SNGANDiscriminator(48, width=2).eval(), torch.rand(2, 3, 48, 48)
    maps = discriminator.layers(images)
    assert maps.shape == (2, 32, 3, 3)
    assert maps.min() >= 0
    torch.testing.assert_close(discriminator(images), maps.flatten(2).sum(2) @ discriminator.score.weight[0])


@pytest.mark.parametrize("size", [32, 48])
def test_state_is_restored(size: int) -> None:
    for kind, batch in ((SNGANGenerator, torch.randn(2, 128)), (SNGANDiscriminator, torch.rand(2, 3, size, size))):
        network, other = kind(size, width=2), kind(size, width=2)
        network(batch)  # moves running statistics and singular vectors
        other.load_state_dict(network.state_dict())
        assert torch.equal(network.eval()(batch), other.eval()(batch))


@pytest.mark.parametrize("kind", [SNGANGenerator, SNGANDiscriminator])
def test_they_can_be_sparse(kind: type[nn.Module]) -> None:
    network = kind(width=4)
    total = sum(weight.parameter.numel() for weight in maskable_weights(network))
    sparse = MaskedNetwork(network, 0.1)
    assert sparse.active == sum(int(mask.sum()) for mask in sparse.masks.values()) == round(0.1 * total)
    assert sum(int(weight.parameter.count_nonzero()) for weight in maskable_weights(network)) <= sparse.active


@pytest.mark.parametrize("kind", [SNGANGenerator, SNGANDiscriminator])
@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("image_size", 64, "is unknown; allowed are 32, 48"),
        ("channels", 0, "must be an integer, at least 1"),
        ("width", 0, "must be an integer, at least 1"),
        ("width", 1.5, "must be an integer, at least 1"),
    ],
)
def test_bad_arguments_are_rejected(kind: type[nn.Module], argument: str, value: float, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}={value} {allowed}"):
        kind(**{argument: value})


def test_a_bad_latent_dim_is_rejected() -> None:
    with pytest.raises(ValueError, match="latent_dim=0 must be an integer, at least 1"):
        SNGANGenerator(latent_dim=0)
