"""Which movement of axes turns images into those that the discriminator takes."""

import pytest
import torch

from lightning_ddst.balance.layout import find_order, list_orders, move

IMAGES = torch.arange(2 * 4 * 3 * 2).reshape(2, 4, 3, 2).float()  # NHWC


@pytest.mark.parametrize(
    ("show", "order"),
    [
        (lambda x: x, (1, 2, 3)),
        (lambda x: x.clone(), (1, 2, 3)),
        (lambda x: x.permute(0, 3, 1, 2), (3, 1, 2)),
        (lambda x: x.permute(0, 3, 1, 2).contiguous(), (3, 1, 2)),
        (lambda x: x.permute(0, 3, 1, 2).double(), (3, 1, 2)),
        (lambda x: x.reshape(2, 2, 4, 3), (1, 2, 3)),
        (lambda x: x.flatten(1), (1, 2, 3)),
        (lambda x: x.permute(0, 3, 1, 2).flatten(1), (3, 1, 2)),
        (lambda x: x.unsqueeze(1), (1, 2, 3)),
        (lambda x: x.transpose(1, 2).unsqueeze(1), (2, 1, 3)),
        (lambda x: x.flip(0), None),
        (lambda x: 2 * x, None),
        (lambda x: x[:1], None),
        (lambda x: x[:, :2], None),
    ],
)
def test_the_order_of_axes_is_found(show, order):
    shown = show(IMAGES)
    assert find_order(IMAGES, shown) == order
    if order is not None:
        assert torch.equal(move(IMAGES, order, shown.shape[1:]).to(shown.dtype), shown)


def test_views_are_compared_by_their_memory():
    constant = torch.zeros(2, 3, 4, 4)  # any order gives the same values
    assert find_order(constant, constant.permute(0, 2, 3, 1)) == (2, 3, 1)
    square = torch.zeros(2, 3, 3, 3)
    assert find_order(square, square.transpose(1, 3)) == (3, 2, 1)


def test_images_that_are_not_moved_stay_themselves():
    assert move(IMAGES, None, torch.Size([1])) is IMAGES


def test_orders_lead_to_the_shape_or_to_vectors():
    assert [*list_orders(torch.Size([4, 3, 2]), torch.Size([2, 4, 3]))] == [(1, 2, 3), (3, 1, 2)]
    assert len([*list_orders(torch.Size([4, 3, 2]), torch.Size([24]))]) == 6
    assert [*list_orders(torch.Size([5]), torch.Size([1, 5]))] == [(1,)]
    assert [*list_orders(torch.Size([4, 3, 2]), torch.Size([5]))] == []
