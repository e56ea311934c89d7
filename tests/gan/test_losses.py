import math

import pytest
import torch
from torch import nn

from lightning_ddst import GANModule
from lightning_ddst.cli import make_cli
from lightning_ddst.gan.losses import LOSSES, Loss, gradient_penalty, r1_penalty

SHAPES = [(3,), (3, 1), (3, 1, 1, 1), (1, 3)]


def test_the_losses_are_these_four() -> None:
    assert list(LOSSES)[:4] == ["hinge", "non-saturating", "wasserstein", "least-squares"]


def test_a_loss_of_the_users_own_is_known_by_its_name(request) -> None:
    @LOSSES.register("mine")
    class Mine(Loss):
        @staticmethod
        def discriminator(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
            return 2 * fake.mean() - real.mean()

        @staticmethod
        def generator(fake: torch.Tensor) -> torch.Tensor:
            return -3 * fake.mean()

    request.addfinalizer(lambda: LOSSES.pop("mine"))
    cli = make_cli(["--model.loss", "mine"], run=False)
    assert float(cli.model.discriminator_loss(torch.zeros(4, 1, 8, 8), None)) != 0
    gan = GANModule(nn.Identity(), nn.Flatten(), loss="mine", latent_dim=1)
    torch.manual_seed(0)
    loss = gan.generator_loss(torch.zeros(5, 1))
    torch.manual_seed(0)
    assert float(loss) == pytest.approx(-3 * float(torch.randn(5, 1).mean()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "discriminator", "generator"),
    [
        # Of 1 - real = (-1, 0.5, 2) and 1 + fake = (-1, 1.5, 1) what is positive: 2.5 / 3 each; fake has mean -0.5.
        ("hinge", 5 / 3, 0.5),
        # Means -0.5 of fake and 0.5 of real.
        ("wasserstein", -1.0, 0.5),
        # (1, -0.5, -2)^2 and (-2, 0.5, 0)^2 sum to 5.25 and 4.25; (-3, -0.5, -1)^2 to 10.25.
        ("least-squares", 0.5 * (5.25 + 4.25) / 3, 0.5 * 10.25 / 3),
    ],
)
def test_losses_of_three_scores(name: str, discriminator: float, generator: float, shape: tuple[int, ...]) -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]).reshape(shape), torch.tensor([-2.0, 0.5, 0.0]).reshape(shape)
    loss = LOSSES[name]
    assert loss.discriminator(real, fake).shape == loss.generator(fake).shape == ()
    assert float(loss.discriminator(real, fake)) == pytest.approx(discriminator)
    assert float(loss.generator(fake)) == pytest.approx(generator)


@pytest.mark.parametrize("shape", SHAPES)
def test_non_saturating_loss_is_the_cross_entropy_of_probabilities(shape: tuple[int, ...]) -> None:
    # Scores are log odds: D gives the real ones 3/4, 1/2, 1/4 and the generated ones 1/4, 1/2, 1/2.
    real = torch.tensor([math.log(3), 0.0, -math.log(3)]).reshape(shape)
    fake = torch.tensor([-math.log(3), 0.0, 0.0]).reshape(shape)
    loss = LOSSES["non-saturating"]
    right = [3 / 4, 1 / 2, 1 / 4], [3 / 4, 1 / 2, 1 / 2]
    expected = -sum(math.log(p) / 3 for chances in right for p in chances)
    assert float(loss.discriminator(real, fake)) == pytest.approx(expected)
    fooled = [1 / 4, 1 / 2, 1 / 2]
    assert float(loss.generator(fake)) == pytest.approx(-sum(math.log(p) / 3 for p in fooled))


def test_non_saturating_loss_of_extreme_scores_is_finite() -> None:
    far = torch.tensor([1000.0, -1000.0])
    loss = LOSSES["non-saturating"]
    assert float(loss.discriminator(far, far)) == pytest.approx(1000.0)  # half of either batch is wrong by 1000
    assert float(loss.generator(far)) == pytest.approx(500.0)


@pytest.mark.parametrize(
    ("name", "to_real", "to_fake", "generator"),
    [
        # Derivatives at real = 0.5, fake = -0.25, each of one score.
        ("hinge", -1.0, 1.0, -1.0),
        ("wasserstein", -1.0, 1.0, -1.0),
        ("least-squares", -0.5, -0.25, -1.25),
        ("non-saturating", -1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(0.25)), -1 / (1 + math.exp(-0.25))),
    ],
)
def test_losses_are_differentiable(name: str, to_real: float, to_fake: float, generator: float) -> None:
    real, fake = torch.tensor([0.5], requires_grad=True), torch.tensor([-0.25], requires_grad=True)
    gradients = torch.autograd.grad(LOSSES[name].discriminator(real, fake), (real, fake))
    assert [float(gradient) for gradient in gradients] == pytest.approx([to_real, to_fake])
    (gradient,) = torch.autograd.grad(LOSSES[name].generator(fake), fake)
    assert float(gradient) == pytest.approx(generator)


def test_hinge_leaves_scores_beyond_the_margin_alone() -> None:
    real, fake = torch.tensor([1.5, 0.5], requires_grad=True), torch.tensor([-1.5, -0.5], requires_grad=True)
    gradients = torch.autograd.grad(LOSSES["hinge"].discriminator(real, fake), (real, fake))
    assert [gradient.tolist() for gradient in gradients] == [[0, -0.5], [0, 0.5]]


# ---- penalties -----------------------------------------------------------------------------------------


class Linear(nn.Module):
    """D(x) = w . x, of slope 5 everywhere, for images of 2x1 pixels."""

    def __init__(self, weight: tuple[float, float] = (3.0, 4.0)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.weight


def test_gradient_penalty_of_a_linear_discriminator() -> None:
    discriminator = Linear()
    penalty = gradient_penalty(discriminator, torch.randn(6, 1, 2, 1), torch.randn(6, 1, 2, 1))
    assert penalty.shape == ()
    assert penalty.item() == pytest.approx(16.0)  # (5 - 1)^2
    (gradient,) = torch.autograd.grad(penalty, discriminator.weight)
    assert gradient.tolist() == pytest.approx([4.8, 6.4])  # 2 (5 - 1) w / 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_penalty_of_images_that_mixed_precision_generated(dtype) -> None:
    real, fake = torch.zeros(3, 1, 2, 1), torch.ones(3, 1, 2, 1, dtype=dtype)
    assert gradient_penalty(Linear(), real, fake).item() == pytest.approx(16.0)


def test_r1_of_a_linear_discriminator() -> None:
    discriminator = Linear()
    penalty = r1_penalty(discriminator, torch.randn(6, 1, 2, 1))
    assert penalty.shape == ()
    assert penalty.item() == pytest.approx(12.5)  # 5^2 / 2
    (gradient,) = torch.autograd.grad(penalty, discriminator.weight)
    assert gradient.tolist() == pytest.approx([3.0, 4.0])


def test_the_penalties_take_the_mean_over_images_of_their_own_slopes() -> None:
    def half_square(images: torch.Tensor) -> torch.Tensor:
        return images.square().flatten(1).sum(1) / 2  # the gradient at an image is the image

    images = torch.tensor([[3.0, 4.0], [0.6, 0.8]]).reshape(2, 1, 2, 1)  # of lengths 5 and 1
    # Between an image and itself there is only itself.
    assert gradient_penalty(half_square, images, images).item() == pytest.approx((16 + 0) / 2)
    assert r1_penalty(half_square, images).item() == pytest.approx((25 + 1) / 2 / 2)


def test_the_gradient_penalty_is_taken_at_a_random_point_on_each_line() -> None:
    torch.manual_seed(0)
    seen = []

    def watched(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.detach().clone())
        return images.flatten(1).sum(1)

    real, fake = torch.randn(200, 1, 2, 2), torch.randn(200, 1, 2, 2)
    gradient_penalty(watched, real, fake)
    (between,) = seen
    shares = ((between - fake) / (real - fake)).flatten(1)
    # One share for all pixels of an image, uniform over images: 5 standard errors around the mean and variance.
    torch.testing.assert_close(shares, shares[:, :1].expand(-1, 4), rtol=0, atol=1e-2)
    shares = shares.median(1).values
    assert float(shares.min()) > -1e-3
    assert float(shares.max()) < 1 + 1e-3
    assert float(shares.mean()) == pytest.approx(1 / 2, abs=5 * (1 / 12 / 200) ** 0.5)
    assert float(shares.var()) == pytest.approx(1 / 12, abs=5 * (1 / 180 / 200) ** 0.5)


@pytest.mark.parametrize("penalty", ["gradient", "r1"])
def test_penalties_train_the_discriminator_and_nothing_behind_the_images(penalty: str) -> None:
    made = torch.randn(4, 1, 2, 1, requires_grad=True)
    real = torch.randn(4, 1, 2, 1, requires_grad=True)
    discriminator = Linear()
    value = gradient_penalty(discriminator, real, made) if penalty == "gradient" else r1_penalty(discriminator, real)
    value.backward()
    assert discriminator.weight.grad is not None
    assert made.grad is None
    assert real.grad is None


def test_r1_does_not_make_the_batch_require_gradients() -> None:
    real = torch.randn(4, 1, 2, 1)
    r1_penalty(Linear(), real)
    assert not real.requires_grad


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        (lambda discriminator, images: gradient_penalty(discriminator, images, images), 1.0),  # (0 - 1)^2
        (r1_penalty, 0.0),
    ],
)
def test_slope_zero_gives_finite_gradients(penalty, expected: float) -> None:
    flat = Linear((0.0, 0.0))
    deep = nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    nn.init.constant_(deep[1].bias, -100.0)  # every unit is dead
    for discriminator in (flat, deep):
        value = penalty(discriminator, torch.randn(4, 1, 2, 1))
        assert value.item() == expected
        gradients = torch.autograd.grad(value, list(discriminator.parameters()), allow_unused=True)
        assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
        assert gradients[0] is not None
