import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ddst.cli import make_cli
from lightning_ddst.gan.augmentation import DIFF_AUGMENTS, diff_augment

ALL = ["color", "translation", "cutout"]
SIZES = st.integers(1, 20)


def random_images(n, channels, height, width, seed=0):
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 4),
    channels=st.sampled_from([1, 3]),
    height=SIZES,
    width=SIZES,
    policy=st.permutations(ALL).flatmap(lambda names: st.integers(0, 3).map(lambda k: names[:k])),
    seed=st.integers(0, 2**32),
)
def test_shape_dtype_and_range_stay_and_gradients_flow(n, channels, height, width, policy, seed):
    torch.manual_seed(seed)
    images = random_images(n, channels, height, width).requires_grad_()
    changed = diff_augment(images, policy)
    assert changed.shape == images.shape
    assert changed.dtype == images.dtype
    assert torch.isfinite(changed).all()
    if "color" not in policy:
        assert changed.abs().max() <= 1
    (gradient,) = torch.autograd.grad(changed.sum(), images)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_right_to_the_second_order(name):
    images = random_images(2, 2, 4, 5).double().requires_grad_()

    def change(images):
        torch.manual_seed(0)
        return diff_augment(images, [name]).square()

    assert torch.autograd.gradcheck(change, images)
    assert torch.autograd.gradgradcheck(change, images)


def test_no_change():
    images = random_images(2, 3, 4, 4)
    assert diff_augment(images, []) is images


def test_names_are_done_in_their_order():
    images = random_images(4, 3, 8, 8)
    torch.manual_seed(0)
    changed = diff_augment(images, ["cutout", "color"])
    torch.manual_seed(0)
    assert torch.equal(changed, DIFF_AUGMENTS["color"](DIFF_AUGMENTS["cutout"](images)))


def test_an_augmentation_of_the_users_own_is_known_by_its_name(request):
    request.addfinalizer(lambda: DIFF_AUGMENTS.pop("mirror", None))

    @DIFF_AUGMENTS.register("mirror")
    def mirror(images):
        return images.flip(3)

    images = random_images(2, 1, 4, 4)
    assert torch.equal(diff_augment(images, ["mirror"]), images.flip(3))
    cli = make_cli(["--model.augment", "[mirror, cutout]"], run=False)
    assert float(cli.model.discriminator_loss(images.repeat(1, 1, 2, 2), None)) > 0


def test_draws_advance_the_random_state():
    images = random_images(4, 3, 8, 8)
    torch.manual_seed(0)
    first, second = diff_augment(images, ALL), diff_augment(images, ALL)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(diff_augment(images, ALL), first)


# ---- by hand, from the same draws -------------------------------------------------------------------


def test_color_by_hand():
    images = random_images(5, 3, 4, 6)
    torch.manual_seed(0)
    changed = diff_augment(images, ["color"])
    torch.manual_seed(0)
    brightness, saturation, contrast = (torch.rand(5).tolist() for _ in range(3))
    for i, image in enumerate(images):
        image = image + (brightness[i] - 0.5)
        gray = (image[0] + image[1] + image[2]) / 3
        image = torch.stack([gray + 2 * saturation[i] * (channel - gray) for channel in image])
        image = image.mean() + (0.5 + contrast[i]) * (image - image.mean())
        assert torch.allclose(changed[i], image, atol=1e-6)


def test_translation_by_hand():
    # An eighth of 12 is 1.5, so up to 2; of 20, 2.5, so up to 3.
    images = random_images(50, 3, 12, 20)
    torch.manual_seed(0)
    changed = diff_augment(images, ["translation"])
    torch.manual_seed(0)
    rows, columns = torch.randint(-2, 3, (50,)).tolist(), torch.randint(-3, 4, (50,)).tolist()
    assert set(rows) == {-2, -1, 0, 1, 2}
    assert set(columns) == {-3, -2, -1, 0, 1, 2, 3}
    for i, image in enumerate(images):
        expected = torch.zeros(3, 12, 20)
        for y in range(12):
            for x in range(20):
                if 0 <= y + rows[i] < 12 and 0 <= x + columns[i] < 20:
                    expected[:, y, x] = image[:, y + rows[i], x + columns[i]]
        assert torch.equal(changed[i], expected)


@pytest.mark.parametrize(
    ("height", "width", "cuts"), [(8, 12, (4, 6)), (6, 10, (3, 5)), (7, 7, (4, 4)), (5, 2, (3, 1))]
)
def test_cutout_by_hand(height, width, cuts):
    images = random_images(60, 3, height, width) + 2
    torch.manual_seed(0)
    changed = diff_augment(images, ["cutout"])
    torch.manual_seed(0)
    # A square of odd size has its middle on a pixel, one of even size between two, or at the border.
    rows, columns = (
        torch.randint(0, size + 1 - cut % 2, (60,)).tolist() for size, cut in zip((height, width), cuts, strict=True)
    )
    for i, image in enumerate(images):
        top, left = rows[i] - cuts[0] // 2, columns[i] - cuts[1] // 2
        expected = image.clone()
        expected[:, max(top, 0) : top + cuts[0], max(left, 0) : left + cuts[1]] = 0
        assert torch.equal(changed[i], expected)


# ---- distributions ----------------------------------------------------------------------------------

N = 4000


def test_the_mean_changes_by_the_brightness_alone():
    images = random_images(1, 3, 4, 4).expand(N, -1, -1, -1)
    torch.manual_seed(0)
    change = (diff_augment(images, ["color"]) - images).mean((1, 2, 3))
    assert change.abs().max() <= 0.5 + 1e-6
    # Uniform: its standard deviation is 1 / sqrt(12) = 0.289, and the mean's 0.289 / sqrt(4000) = 0.0046.
    assert change.mean() == pytest.approx(0, abs=0.02)
    assert change.std() == pytest.approx(12**-0.5, abs=0.01)


def test_gray_images_have_no_saturation_to_change():
    images = random_images(1, 1, 4, 4).expand(N, 3, -1, -1)
    torch.manual_seed(0)
    changed = diff_augment(images, ["color"])
    assert torch.allclose(changed, changed[:, :1].expand_as(changed), atol=1e-6)
    contrast = changed.std((1, 2, 3)) / images.std((1, 2, 3))
    assert contrast.min() >= 0.5 - 1e-4
    assert contrast.max() <= 1.5 + 1e-4
    assert contrast.mean() == pytest.approx(1, abs=0.02)


def test_images_are_changed_independently():
    images = random_images(1, 3, 16, 16).expand(64, -1, -1, -1)
    for name in ALL:
        torch.manual_seed(0)
        assert len({image.numpy().tobytes() for image in diff_augment(images, [name])}) > 15


def test_the_share_cut_out():
    # The middle is uniform over 0, ..., 8; of 4 rows, 2, 3, 4, 4, 4, 4, 4, 3, 2 are inside: 30 / 9 on average.
    torch.manual_seed(0)
    share = (diff_augment(torch.ones(N, 1, 8, 8), ["cutout"]) == 0).float().mean()
    assert share == pytest.approx((30 / 9 / 8) ** 2, abs=0.005)


# ---- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "policy", "message"),
    [
        ((1, 3, 4, 4), ["colour"], "policy='colour' .*color, translation, cutout"),
        ((1, 3, 4, 4), "color", r"policy='color' must be .*\['color', 'cutout'\]"),
        ((3, 4, 4), ["color"], r"images of shape \(3, 4, 4\) .*\(batch, channels, height, width\)"),
    ],
)
def test_bad_input_is_rejected(shape, policy, message):
    with pytest.raises(ValueError, match=message):
        diff_augment(torch.zeros(shape), policy)
