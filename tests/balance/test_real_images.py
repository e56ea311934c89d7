"""Which images of a batch are real, and whether the discriminator is shown them as they are."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from lightning_ddst.balance.calls import Adversarial, Call, Generated, Scored
from lightning_ddst.balance.real_images import (
    ImageArgument,
    check_shown,
    find_call_on_real,
    find_real_images,
    is_rescaled,
)

SHAPE = torch.Size([2])


def generator_step(fake, argument=None, *beside, as_it_is=True, **named):
    """The generator's step with the discriminator's arguments: the fakes by default, and others."""
    made = Generated(Call((), {}), SimpleNamespace(), 0, fake, 0, object())
    call = Call((fake if argument is None else argument, *beside), named)
    return Adversarial(call, 0, SimpleNamespace(), torch.tensor(0.0), made, 0, as_it_is)


# ---- finding the images ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch_of",
    [
        lambda real: real,
        lambda real: (real, torch.arange(4)),
        lambda real: {"data": ({"x": real}, None), "mask": torch.ones(4, 2, dtype=torch.bool)},
        lambda real: (real, torch.ones(4, 2, dtype=torch.long), torch.ones(4, 3)),
    ],
    ids=["tensor", "tuple", "nested", "other tensors"],
)
def test_the_one_tensor_of_the_shape_is_found(batch_of):
    real = torch.randn(4, 2, requires_grad=True)
    found = find_real_images(batch_of(real), None, SHAPE)
    assert found.data_ptr() == real.data_ptr()
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("batch", "seen"),
    [
        (None, "no tensor"),
        ([], "no tensor"),
        (torch.arange(2), "(2,) torch.int64"),
        ({"image": torch.zeros(2, 3, dtype=torch.uint8)}, "image (2, 3) torch.uint8"),
        ((torch.zeros(4, 5), [torch.zeros(4)]), "0 (4, 5) torch.float32, 1.0 (4,) torch.float32"),
    ],
    ids=["no batch", "empty", "labels only", "integers", "other shapes"],
)
def test_a_batch_without_real_images_is_described(batch, seen):
    with pytest.raises(RuntimeError, match=r"no floating-point tensor of shape \(batch, 2\)") as error:
        find_real_images(batch, None, SHAPE)
    assert f"holds {seen}." in str(error.value)


RESTORED = {"input": torch.zeros(2, 2), "more": [torch.arange(2), {"target": torch.ones(6, 2)}]}


def test_the_error_names_all_tensors_shaped_like_images():
    named = r'2 tensors .* \(batch, 2\).*: input, more.1.target\..* with real="input" or real="more.1.target"'
    with pytest.raises(RuntimeError, match=named):
        find_real_images(RESTORED, None, SHAPE)


@pytest.mark.parametrize(("place", "value"), [("input", 0), ("more.1.target", 1)])
def test_the_real_images_are_those_named(place, value):
    assert (find_real_images(RESTORED, place, SHAPE) == value).all()


def test_an_index_names_an_entry_of_a_list():
    assert (find_real_images([torch.zeros(2, 2), torch.ones(2, 2)], 1, SHAPE) == 1).all()


@pytest.mark.parametrize("place", [3, "target", "more.0.target", "more.2", "more.1.target.5"])
def test_the_error_names_missing_real_images(place):
    with pytest.raises(RuntimeError, match=rf"real={place!r} is no tensor in the batch; it holds input \(2, 2\)"):
        find_real_images(RESTORED, place, SHAPE)


# ---- finding the discriminator's arguments -----------------------------------------------------------------

FAKE, REAL = torch.zeros(2, 2), torch.ones(3, 2)
FAKE_LABELS, REAL_LABELS = torch.tensor([0, 2]), torch.tensor([1, 1, 0])


def test_the_arguments_are_those_of_the_last_call_on_the_real_images():
    step = generator_step(FAKE, None, FAKE_LABELS)
    calls = [Call((REAL.detach(), torch.full((3,), value)), {}) for value in (5, 6)]
    other = Call((REAL.clone(), REAL_LABELS), {})  # equal, but not the batch's
    scored = [*(Scored(call, 0) for call in (*calls, other)), step]
    assert find_call_on_real(REAL, (REAL, REAL_LABELS), step, scored) is calls[1]


@pytest.mark.parametrize("keyword", [False, True])
def test_labels_are_replaced_by_those_of_the_batch(keyword):
    step = generator_step(FAKE, labels=FAKE_LABELS) if keyword else generator_step(FAKE, None, FAKE_LABELS)
    batch = [torch.zeros(3), REAL, REAL_LABELS]  # the zeros are of the labels' shape, but not of their type
    call = find_call_on_real(REAL, batch, step, [step])
    assert call.tensor_at(0).data_ptr() == REAL.data_ptr()
    assert call.tensor_at("labels" if keyword else 1) is REAL_LABELS


def test_images_get_the_type_of_the_fakes():
    step = generator_step(FAKE.bfloat16())
    assert find_call_on_real(REAL, REAL, step, [step]).args[0].dtype == torch.bfloat16


def test_a_condition_out_of_the_batch_stays():
    batch = {"image": torch.ones(2, 2), "map": torch.rand(2, 5)}
    step = generator_step(FAKE, None, batch["map"])
    assert find_call_on_real(batch["image"], batch, step, [step]).args[1] is batch["map"]


@pytest.mark.parametrize("argument", [torch.tensor(0.5), torch.rand(7), "text"])
def test_an_argument_that_is_one_for_all_images_stays(argument):
    step = generator_step(FAKE, None, argument)
    assert find_call_on_real(REAL, (REAL, torch.rand(3)), step, [step]).args[1] is argument


@pytest.mark.parametrize("condition", [F.one_hot(FAKE_LABELS).float(), torch.rand(2, 3)])
def test_a_condition_of_real_images_that_was_never_seen_is_rejected(condition):
    step = generator_step(FAKE, None, condition)
    with pytest.raises(RuntimeError, match=r"discriminator .* argument 1 .* none of the batch"):
        find_call_on_real(REAL, (REAL, REAL_LABELS), step, [step])


def test_a_condition_that_could_be_several_of_the_batch_is_rejected():
    step = generator_step(FAKE, labels=FAKE_LABELS)
    batch = {"image": REAL, "index": torch.arange(3), "label": REAL_LABELS}
    with pytest.raises(RuntimeError, match=r"argument 'labels' .* index, label "):
        find_call_on_real(REAL, batch, step, [step])


def test_labels_of_fakes_that_are_joined_with_others_are_rejected():
    step = generator_step(FAKE, torch.cat([REAL, FAKE]), torch.arange(5))
    with pytest.raises(RuntimeError, match=r"called on 5 images .* argument 1"):
        find_call_on_real(REAL, (REAL, REAL_LABELS), step, [step])


# ---- what was shown ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "as_it_is", "changes"),
    [
        (lambda fake: fake, True, False),
        (lambda fake: fake, False, True),
        (torch.clone, False, False),
        (torch.tanh, False, True),
        (lambda fake: torch.cat([fake, torch.zeros(3, 2)]), False, False),
        (lambda fake: torch.cat([torch.zeros(3, 2), fake]), False, False),
        (lambda fake: torch.cat([torch.zeros(3, 2), 2 * fake]), False, True),
    ],
    ids=["itself", "in place", "a copy", "tanh", "first", "last", "changed and joined"],
)
def test_it_is_seen_whether_the_training_step_changes_fakes(argument, as_it_is, changes):
    fake = torch.rand(4, 2) + 1
    argument = ImageArgument.of_step(generator_step(fake, argument(fake), as_it_is=as_it_is))
    assert argument == ImageArgument(0, SHAPE, changes, SHAPE)


def test_shown_are_parts_of_images_as_many_as_the_real_ones_and_no_fakes():
    real, fake = torch.zeros(2, 2), torch.rand(2, 2)
    calls = [
        Call((torch.tensor([[1.0, 1], [2, 2], [3, 3]]), real), {}),  # the other argument does not count
        Call((fake,), {}),
        Call((torch.rand(2, 3),), {}),  # other shapes
        Call((torch.rand(1, 2),), {}),  # too few
        Call((), {"x": real}),
    ]
    shown = ImageArgument(0, SHAPE, False, SHAPE).find_shown(
        real, [generator_step(fake).made], [Scored(call, 0) for call in calls]
    )
    assert [part.tolist() for part in shown] == [[[1, 1], [2, 2]], [[2, 2], [3, 3]]]


@pytest.mark.parametrize(
    ("show", "as_they_are"),
    [
        (lambda x: x, True),
        (torch.clone, True),
        (lambda x: x.flip(0), False),
        (lambda x: x + 0.05 * torch.randn(8, 2), False),
    ],
    ids=["themselves", "copied", "in another order", "augmented"],
)
def test_images_shown_as_they_are_or_augmented_are_no_mistake(show, as_they_are):
    torch.manual_seed(0)
    real = torch.rand(8, 2)
    assert check_shown([torch.rand(8, 2), show(real)], real, (real,)) == ((1,) if as_they_are else None)
    assert check_shown([], real, (real,)) is None


def test_images_that_are_rescaled_are_rejected():
    real = torch.rand(8, 2)
    with pytest.raises(RuntimeError, match="changes the values of the batch's images"):
        check_shown([2 * real - 1], real, real)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.tanh(),
        lambda x: x.clamp(0.3, 0.6),
        lambda x: (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True),
        lambda x: x + torch.rand(len(x), 1, 1, 1),
    ],
    ids=["tanh", "clamped", "normalized by image", "brighter by image"],
)
def test_images_whose_values_are_changed_image_by_image_are_rejected(change):
    torch.manual_seed(0)
    real = torch.rand(8, 3, 4, 4)
    with pytest.raises(RuntimeError, match="changes the values of the batch's images"):
        check_shown([change(real)], real, real)
    assert check_shown([change(real)], real, real, changes_fakes=True) is None  # an augmentation of both


@pytest.mark.parametrize(
    "change", [lambda x: x + 0.1 * torch.rand_like(x), lambda x: x.flip(3), lambda x: x.roll(1, 2)]
)
def test_augmented_images_do_not_count_as_changed_by_their_values(change):
    torch.manual_seed(0)
    real = torch.rand(8, 3, 4, 4)
    assert check_shown([change(real)], real, real) is None


def test_fakes_that_are_changed_alone_are_rejected():
    real = torch.rand(8, 2)
    assert check_shown([], real, real, changes_fakes=True) is None  # the real ones may still come
    with pytest.raises(RuntimeError, match="changes what the generator returns"):
        check_shown([real], real, real, changes_fakes=True)


def test_the_error_names_other_images_of_the_batch():
    batch = {"input": torch.rand(8, 2), "target": torch.rand(8, 2)}
    with pytest.raises(RuntimeError, match=r"real='target', .* shown .input."):
        check_shown([batch["input"]], batch["target"], batch, place="target")


@pytest.mark.parametrize(("a", "b"), [(2, -1), (-1, 0), (1, 0.5), (127.5, 127.5)])
def test_one_scale_for_all_is_seen(a, b):
    real = torch.rand(8, 2)
    assert is_rescaled(a * real + b, real)


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 1)])
def test_a_scale_for_each_channel_is_seen(shape):
    real = torch.rand(4, 3, 5, 5) if len(shape) == 3 else torch.rand(4, 3, 25)
    mean, deviation = torch.tensor([0.5, 0.4, 0.3]).view(shape), torch.tensor([0.2, 0.3, 0.1]).view(shape)
    assert is_rescaled((real - mean) / deviation, real)


@pytest.mark.parametrize("change", [lambda x: x, lambda x: x.square(), lambda x: x.flip(0), lambda x: 0 * x])
def test_what_is_no_rescaling_is_not_seen_as_one(change):
    torch.manual_seed(0)
    real = torch.rand(64, 3, 5, 5)
    assert not is_rescaled(change(real), real)


@pytest.mark.parametrize("joined", [True, False])
def test_channels_that_the_training_step_normalises_are_rejected(joined):
    real = torch.rand(4, 3, 5, 5)
    shown = (real - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.1]).view(3, 1, 1)
    scored = Scored(Call((torch.cat([shown, torch.rand(4, 3, 5, 5)]) if joined else shown,), {}), 0)
    with pytest.raises(RuntimeError, match="changes the values of the batch's images"):
        check_shown(ImageArgument(0, real.shape[1:], False, real.shape[1:]).find_shown(real, [], [scored]), real, real)
