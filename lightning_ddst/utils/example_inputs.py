"""Example inputs of a GAN's two networks, for use before any training step."""

from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_ddst.utils.modules import eval_mode
from lightning_ddst.utils.nested import get_first_tensor


def get_generator_inputs(module: nn.Module, batch: int = 2) -> tuple[Any, ...]:
    """Returns example arguments of a generator.

    Args:
        module: The module that holds the generator: a `GANModule`, or one with Lightning's ``example_input_array``.
        batch: Number of samples for a `GANModule`.

    Returns:
        The arguments, on the CPU; the same every time.

    Raises:
        ValueError: If the module has neither ``latent_dim`` nor ``example_input_array``.
    """
    latent_dim, classes = getattr(module, "latent_dim", None), getattr(module, "num_classes", None)
    given = getattr(module, "example_input_array", None)
    if given is not None:
        return tuple(given) if isinstance(given, tuple | list) else (given,)
    if latent_dim is None:
        raise ValueError(
            f"{type(module).__name__} has no latent_dim, so the arguments of its generator are unknown: set the "
            "module's example_input_array, as in Lightning, to an example tensor, or to a tuple of the arguments."
        )
    noise = torch.randn(batch, latent_dim, generator=torch.Generator().manual_seed(0))
    return (noise,) if classes is None else (noise, torch.arange(batch) % classes)


@torch.no_grad()
def infer_inputs(
    module: nn.Module, generator: nn.Module, discriminator: nn.Module
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Returns example arguments of a generator and of its discriminator, in the generator's precision, on its device.

    The function assumes that the discriminator takes the generator's output, followed by the generator's arguments
    after the first one, such as labels. If the generator returns several tensors, and the discriminator cannot be
    called with all of them, it takes the first.

    Raises:
        ValueError: If the module has no example, or the generator cannot be called with it.
    """
    like = next(generator.parameters())
    device = like.device
    inputs = tuple(_convert(v, like) if isinstance(v, Tensor) else v for v in get_generator_inputs(module))
    with eval_mode(generator), isolate_rng(include_cuda=device.type == "cuda"):
        try:
            fake = generator(*inputs)
        except Exception as error:  # the user's network may raise anything
            raise ValueError(f"the generator cannot be called with the module's example: {error}") from error
        if not isinstance(fake, Tensor):
            try:
                with eval_mode(discriminator):
                    discriminator(fake, *inputs[1:])
            except Exception:  # the user's network may raise anything
                fake = get_first_tensor(fake)
    return inputs, (fake, *inputs[1:])


def _convert(value: Tensor, like: Tensor) -> Tensor:
    """Moves a tensor to another one's device, and converts it to its precision if both are floating-point."""
    floats = value.is_floating_point() and like.is_floating_point()
    return value.to(like.device, like.dtype if floats else value.dtype)
