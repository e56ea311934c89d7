import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from lightning_ddst.models import BigGANDiscriminator, BigGANGenerator
from lightning_ddst.models.biggan import ConditionalBatchNorm2d, SelfAttention
from lightning_ddst.sparsity import MaskedNetwork, maskable_weights

LATENT = {32: 128, 64: 100}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def small(size: int) -> tuple[BigGANGenerator, BigGANDiscriminator]:
    """Networks of few channels, with attention that does something."""
    width = {32: 2, 64: 4}[size]
    networks = BigGANGenerator(size, width=width, shared_dim=3), BigGANDiscriminator(size, width=width)
    for network in networks:
        for module in network.modules():
            if isinstance(module, SelfAttention):
                nn.init.ones_(module.gamma)
    return networks


def figures(network: nn.Module, *shape: int) -> tuple[int, int, int]:
    """Parameters, maskable weights, and operations of one forward pass, which computes nothing."""
    network.eval().to("meta")
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, *shape, device="meta"), torch.zeros(1, dtype=torch.long, device="meta"))
    maskable = sum(weight.parameter.numel() for weight in maskable_weights(network))
    return sum(parameter.numel() for parameter in network.parameters()), maskable, counter.get_total_flops()


@pytest.mark.parametrize(
    ("size", "classes", "generator", "discriminator"),
    [
        # Equal to those of the networks in the code of "Balanced Training for Sparse GANs" (biggan.py for CIFAR-10;
        # big_resnet.py for Tiny ImageNet, StudioGAN's), instantiated; outputs are equal for equal weights.
        (32, 10, (4_304_387, 4_266_752, 3_362_258_944), (4_207_361, 4_202_240, 2_162_033_152)),
        (64, 200, (17_335_204, 17_285_360, 6_220_350_720), (30_796_722, 30_533_280, 3_468_659_200)),
    ],
)
def test_the_default_networks_are_the_published_ones(
    size: int, classes: int, generator: tuple[int, int, int], discriminator: tuple[int, int, int]
) -> None:
    network = BigGANGenerator(size, num_classes=classes, initialization="normal")  # drawn faster
    assert network.latent_dim == LATENT[size]
    assert figures(network, LATENT[size]) == generator
    network = BigGANDiscriminator(size, num_classes=classes, initialization="normal")
    assert figures(network, 3, size, size) == discriminator


def test_the_networks_for_cifar_counted_by_hand() -> None:
    networks = BigGANGenerator(), BigGANDiscriminator()
    # SNGAN's generator; but 10 classes have gains and biases in the two norms of each of three blocks.
    assert figures(networks[0], 128)[0] == 4_276_739 + 9 * (3 * 2 * 2 * 256)
    # SNGAN's discriminator of 256 channels: a block on the image, one that halves, two others, the score.
    weights = (9 * 3 + 9 * 256 + 3) * 256 + (9 + 9 + 1) * 256**2 + 2 * (9 + 9) * 256**2 + 256
    biases, embedding = (3 + 3 + 2 + 2) * 256 + 1, 10 * 256
    assert figures(networks[1], 3, 32, 32)[:2] == (weights + biases + embedding, weights)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [32, 64])
def test_shapes_and_range_with_few_channels(size: int, channels: int) -> None:
    generator = BigGANGenerator(size, channels, width=1, latent_dim=10, num_classes=3, shared_dim=4)
    assert generator.latent_dim == 10
    labels = torch.tensor([0, 2, 1, 0])
    images = generator(10 * torch.randn(4, 10), labels)
    assert images.shape == (4, channels, size, size)
    assert images.abs().max() <= 1
    assert BigGANDiscriminator(size, channels, width=1, num_classes=3)(images, labels).shape == (4,)


def test_width_scales_every_map() -> None:
    def widths(network: nn.Module) -> list[int]:
        return [module.out_channels for name, module in network.named_modules() if name.endswith("conv1")]

    assert widths(BigGANGenerator(32, width=2)) == [8, 8, 8]
    assert widths(BigGANGenerator(64, width=2)) == [16, 8, 4, 2]
    assert widths(BigGANDiscriminator(32, width=2)) == [8, 8, 8, 8]
    assert widths(BigGANDiscriminator(64, width=2)) == [2, 4, 8, 16, 32]


@pytest.mark.parametrize("size", [32, 64])
def test_gradients_reach_every_parameter(size: int) -> None:
    generator, discriminator = small(size)
    labels = torch.arange(20) % 10
    images = generator.eval()(torch.randn(20, LATENT[size]), labels)  # BatchNorm cancels biases in training
    discriminator(images, labels).sum().backward()
    for network in (generator, discriminator):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_conditional_batch_norm_has_statistics_of_the_condition() -> None:
    norm = ConditionalBatchNorm2d(nn.Embedding, 3, 4)
    maps = 5 + 3 * torch.randn(8, 4, 6, 6)
    for label in range(3):
        output = norm(maps, torch.full((8,), label))
        torch.testing.assert_close(output.mean((0, 2, 3)), norm.bias.weight[label])
        std = output.std((0, 2, 3), correction=0)
        torch.testing.assert_close(std, (1 + norm.gain.weight[label]).abs(), rtol=1e-4, atol=1e-4)


def test_every_image_has_the_norm_of_its_own_condition() -> None:
    norm = ConditionalBatchNorm2d(nn.Linear, 2, 4).eval()
    maps, conditions = torch.randn(5, 4, 3, 3), torch.randn(5, 2)
    together = norm(maps, conditions)
    for i in range(5):
        torch.testing.assert_close(norm(maps[i : i + 1], conditions[i : i + 1])[0], together[i])


@pytest.mark.parametrize("size", [32, 64])
def test_images_depend_on_their_own_labels(size: int) -> None:
    generator = small(size)[0].eval()
    z = torch.randn(1, LATENT[size]).expand(3, -1)
    images = generator(z, torch.tensor([1, 2, 1]))
    torch.testing.assert_close(images[0], images[2])
    assert not torch.allclose(images[0], images[1], atol=1e-3)


def test_every_part_of_the_noise_matters() -> None:
    generator = small(64)[0].eval()
    z, label = torch.randn(1, 100), torch.tensor([3])
    images = generator(z, label)
    for start in range(0, 100, 20):
        other = z.clone()
        other[:, start : start + 20] = torch.randn(20)
        assert not torch.allclose(generator(other, label), images, atol=1e-4), start


@pytest.mark.parametrize("size", [32, 64])
def test_the_discriminator_projects_on_the_label(size: int) -> None:
    discriminator, images = small(size)[1].eval(), torch.rand(4, 3, size, size)
    features = discriminator.layers(images).sum((2, 3))
    labels, others = torch.tensor([0, 2, 1, 9]), torch.tensor([1, 2, 3, 4])
    embedded = discriminator.embedding.weight
    difference = ((embedded[labels] - embedded[others]) * features).sum(1)
    torch.testing.assert_close(discriminator(images, labels) - discriminator(images, others), difference)
    assert difference[0] != 0
    assert difference[1] == 0


def test_attention_starts_as_the_identity() -> None:
    maps = torch.randn(2, 16, 4, 6)
    assert torch.equal(SelfAttention(16)(maps), maps)


def test_attention_is_unscaled_over_pooled_keys_and_values() -> None:
    attention, maps = SelfAttention(16), torch.randn(2, 16, 4, 6)
    nn.init.constant_(attention.gamma, 0.5)
    query, key, value = attention.query(maps), attention.key(maps), attention.value(maps)
    key, value = F.max_pool2d(key, 2), F.max_pool2d(value, 2)
    assert (query.shape, key.shape, value.shape) == ((2, 2, 4, 6), (2, 2, 2, 3), (2, 8, 2, 3))
    sequences = (maps.flatten(2).transpose(1, 2) for maps in (query, key, value))
    attended = F.scaled_dot_product_attention(*sequences, scale=1.0).transpose(1, 2).unflatten(2, (4, 6))
    torch.testing.assert_close(attention(maps), maps + 0.5 * attention.output(attended))


def test_attention_has_its_place_at_32_pixels_of_64() -> None:
    seen: list[torch.Size] = []
    for network in small(64):
        (attention,) = (module for module in network.modules() if isinstance(module, SelfAttention))
        attention.register_forward_hook(lambda module, args, output: seen.append(output.shape[1:]))
        with torch.no_grad():
            batch = torch.randn(1, 100) if isinstance(network, BigGANGenerator) else torch.rand(1, 3, 64, 64)
            network.eval()(batch, torch.tensor([0]))
    assert seen == [(8, 32, 32), (4, 32, 32)]
    assert not any(isinstance(module, SelfAttention) for network in small(32) for module in network.modules())


@pytest.mark.parametrize("size", [32, 64])
def test_every_layer_has_spectral_norm_one(size: int) -> None:
    generator = BigGANGenerator(size, width=1, shared_dim=3, initialization="normal")
    discriminator = BigGANDiscriminator(size, width=1, initialization="normal")
    labels = torch.tensor([0, 1])
    z, images = torch.randn(2, LATENT[size]), torch.rand(2, 3, size, size)
    with torch.no_grad():
        for _ in range(50):  # a power iteration each
            generator(z, labels)
            discriminator(images, labels)
    for network, kinds in ((generator, (nn.Conv2d, nn.Linear)), (discriminator, (nn.Conv2d, nn.Linear, nn.Embedding))):
        for layer in network.eval().modules():
            if isinstance(layer, kinds):
                assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)
            elif isinstance(layer, nn.Embedding):  # of the generator
                assert not parametrize.is_parametrized(layer)


@pytest.mark.parametrize("size", [32, 64])
def test_weights_are_orthogonal_at_the_start(size: int) -> None:
    for network in small(size):
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                matrix = parameter.flatten(1)
                gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
                torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-4, rtol=0, msg=name)
            elif name.endswith("bias"):
                assert not parameter.any() or ".norm" in name or name.startswith("last.0"), name


def test_weights_are_normal_where_asked_for() -> None:
    network = BigGANGenerator(width=4, initialization="normal")
    assert network.first.parametrizations.weight.original.std().item() == pytest.approx(0.02, rel=0.05)
    assert network.blocks[0].norm1.gain.weight.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("size", [32, 64])
def test_state_is_restored(size: int) -> None:
    labels = torch.tensor([0, 5])
    batches = torch.randn(2, LATENT[size]), torch.rand(2, 3, size, size)
    for network, other, batch in zip(small(size), small(size), batches, strict=True):
        network(batch, labels)  # moves running statistics and singular vectors
        other.load_state_dict(network.state_dict())
        assert torch.equal(network.eval()(batch, labels), other.eval()(batch, labels))


@pytest.mark.parametrize("size", [32, 64])
def test_they_can_be_sparse(size: int) -> None:
    for network in small(size):
        total = sum(weight.parameter.numel() for weight in maskable_weights(network))
        sparse = MaskedNetwork(network, 0.1)
        assert sparse.active == sum(int(mask.sum()) for mask in sparse.masks.values()) == round(0.1 * total)
        assert sum(int(weight.parameter.count_nonzero()) for weight in maskable_weights(network)) <= sparse.active


@pytest.mark.parametrize("kind", [BigGANGenerator, BigGANDiscriminator])
@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("image_size", 48, "is unknown; allowed are 32, 64"),
        ("channels", 0, "must be an integer, at least 1"),
        ("width", -1, "must be an integer, at least 1"),
        ("num_classes", 0, "must be an integer, at least 1"),
        ("initialization", "xavier", "is unknown; allowed are orthogonal, normal"),
    ],
)
def test_bad_arguments_are_rejected(kind: type[nn.Module], argument: str, value: int | str, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}={value!r} {allowed}"):
        kind(**{argument: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latent_dim": 0}, "latent_dim=0 must be an integer, at least 1"),
        ({"shared_dim": 0}, "shared_dim=0 must be an integer, at least 1"),
        ({"image_size": 64, "latent_dim": 128}, "latent_dim=128 must be a multiple of 5 with 64 pixels"),
    ],
)
def test_bad_arguments_of_the_generator_are_rejected(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BigGANGenerator(**arguments)
