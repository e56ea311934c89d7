"""Finds how a training step moved the axes of images, or reshaped them, before the discriminator took them.

An order of axes is a permutation of the axes after the first, counted from 1: NHWC images shown as NCHW have the order
(3, 1, 2). A reshape that keeps the axes in their order, as (B, T) to (B, 1, T), has the order (1, 2, ...).
"""

from collections.abc import Iterator
from itertools import permutations

import torch
from torch import Tensor

Order = tuple[int, ...]


def move(images: Tensor, order: Order | None, shape: torch.Size) -> Tensor:
    """Moves the axes of images and reshapes them, as the training step does.

    Args:
        images: The images.
        order: The order of axes; None leaves images as they are.
        shape: The shape of one image afterwards.
    """
    return images if order is None else images.permute(0, *order).reshape(len(images), *shape)


def list_orders(source: torch.Size, shape: torch.Size) -> Iterator[Order]:
    """Yields the orders of axes in which images of one shape could be shown in another, the unchanged order first.

    Args:
        source: The shape of one image.
        shape: The shape of one image as shown.
    """
    wanted = [size for size in shape if size > 1]
    for order in permutations(range(1, len(source) + 1)):
        moved = [source[axis - 1] for axis in order if source[axis - 1] > 1]
        unchanged = order == tuple(sorted(order))
        if source.numel() == shape.numel() and (unchanged or moved == wanted or len(wanted) == 1):
            yield order


def find_order(source: Tensor, shown: Tensor) -> Order | None:
    """Finds the order of axes in which shown images are the source's; None if they are other images.

    Args:
        source: Images.
        shown: As many images, of any shape; views of the source are compared by their memory, others by their values.
    """
    if source.dim() == 0 or shown.dim() == 0 or len(source) != len(shown) or source.device != shown.device:
        return None
    source = source.detach()
    same_memory = source.untyped_storage().data_ptr() == shown.untyped_storage().data_ptr()
    found = None
    for order in list_orders(source.shape[1:], shown.shape[1:]):
        moved = move(source, order, shown.shape[1:])
        if same_memory and moved.data_ptr() == shown.data_ptr() and moved.stride() == shown.stride():
            return order
        if found is None and torch.equal(moved.to(shown.dtype), shown):
            found = order
    return found
