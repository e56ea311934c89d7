import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_ddst.models import DCGANDiscriminator, DCGANGenerator
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
    ("size", "expected"),
    [
        # Equal to those of the network in the code of "Balanced Training for Sparse GANs" (dcgan.py), instantiated.
        (32, (3_813_379, 3_802_816, 206_962_688)),
        (48, (5_134_339, 5_113_536, 465_666_048)),
    ],
)
def test_the_default_generator_is_the_published_one(size: int, expected: tuple[int, int, int]) -> None:
    assert figures(DCGANGenerator(size), 128) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [(32, (2_935_873, 2_934_464, 217_464_832)), (48, (2_946_113, 2_944_704, 489_295_872))],
)
def test_the_default_discriminator_is_the_published_one(size: int, expected: tuple[int, int, int]) -> None:
    assert figures(DCGANDiscriminator(size), 3, size, size) == expected
    # Miyato et al. 2018, table 3: channels in and out, height of the kernel, halvings before its output. (In the code
    # of "Balanced Training for Sparse GANs" channels double in the convolutions of stride 2: twice the weights.)
    table = [(3, 64, 3, 0), (64, 64, 4, 1), (64, 128, 3, 1), (128, 128, 4, 2)]
    table += [(128, 256, 3, 2), (256, 256, 4, 3), (256, 512, 3, 3)]
    dense = 512 * (size // 8) ** 2
    maskable = sum(n_in * n_out * kernel**2 for n_in, n_out, kernel, _ in table) + dense
    biases = sum(n_out for _, n_out, _, _ in table) + 1
    flops = 2 * sum(n_in * n_out * kernel**2 * (size >> halvings) ** 2 for n_in, n_out, kernel, halvings in table)
    assert expected == (maskable + biases, maskable, flops + 2 * dense)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 24, 32, 48])
def test_shapes_and_range_with_few_channels(size: int, channels: int) -> None:
    generator = DCGANGenerator(size, channels, width=2, latent_dim=5)
    assert generator.latent_dim == 5
    images = generator(10 * torch.randn(4, 5))
    assert images.shape == (4, channels, size, size)
    assert images.abs().max() <= 1
    assert DCGANDiscriminator(size, channels, width=2)(images).shape == (4,)


def test_gradients_reach_every_parameter() -> None:
    generator, discriminator = DCGANGenerator(width=2), DCGANDiscriminator(width=2)
    discriminator(generator.eval()(torch.randn(8, 128))).sum().backward()  # BatchNorm cancels biases in training
    for network in (generator, discriminator):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_the_discriminator_leaks_a_tenth() -> None:
    leaks = [module for module in DCGANDiscriminator(width=2).layers if isinstance(module, nn.LeakyReLU)]
    assert [leak.negative_slope for leak in leaks] == [0.1] * 7


def test_weights_are_drawn_from_a_narrow_normal_distribution() -> None:
    for layer in DCGANGenerator(width=16).modules():
        if isinstance(layer, nn.Linear | nn.ConvTranspose2d):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert not layer.bias.any()


def test_every_layer_of_the_discriminator_has_spectral_norm_one() -> None:
    discriminator, images = DCGANDiscriminator(width=2), torch.rand(1, 3, 32, 32)
    for _ in range(50):
        discriminator(images)  # a power iteration each
    discriminator.eval()
    layers = [module for module in discriminator.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == 8
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_state_is_restored() -> None:
    for kind, batch in ((DCGANGenerator, torch.randn(2, 128)), (DCGANDiscriminator, torch.rand(2, 3, 32, 32))):
        network, other = kind(width=2), kind(width=2)
        network(batch)  # moves running statistics and singular vectors
        other.load_state_dict(network.state_dict())
        assert torch.equal(network.eval()(batch), other.eval()(batch))


@pytest.mark.parametrize("kind", [DCGANGenerator, DCGANDiscriminator])
def test_they_can_be_sparse(kind: type[nn.Module]) -> None:
    network = kind(width=4)
    total = sum(weight.parameter.numel() for weight in maskable_weights(network))
    sparse = MaskedNetwork(network, 0.1)
    assert sparse.active == sum(int(mask.sum()) for mask in sparse.masks.values()) == round(0.1 * total)
    assert sum(int(weight.parameter.count_nonzero()) for weight in maskable_weights(network)) <= sparse.active


@pytest.mark.parametrize("kind", [DCGANGenerator, DCGANDiscriminator])
@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("image_size", 0, "must be a multiple of 8, at least 8"),
        ("image_size", -8, "must be a multiple of 8, at least 8"),
        ("image_size", 28, "must be a multiple of 8, at least 8"),
        ("channels", 0, "must be an integer, at least 1"),
        ("width", 0, "must be an integer, at least 1"),
    ],
)
def test_bad_arguments_are_rejected(kind: type[nn.Module], argument: str, value: int, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}={value} {allowed}"):
        kind(**{argument: value})


def test_a_bad_latent_dim_is_rejected() -> None:
    with pytest.raises(ValueError, match="latent_dim=0 must be an integer, at least 1"):
        DCGANGenerator(latent_dim=0)
