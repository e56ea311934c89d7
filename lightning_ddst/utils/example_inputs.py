"""What a GAN's two networks are called with: examples, where nothing has been called yet."""

from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_ddst.utils.modules import eval_mode


def get_generator_inputs(module: nn.Module, batch: int = 2) -> tuple[Any, ...]:
    """What a generator is called with.

    Args:
        module: The module that holds it: a `GANModule`, or one with Lightning's ``example_input_array``.
        batch: Number of samples of a `GANModule`'s.

    Returns:
        The arguments, on the CPU; the same every time.

    Raises:
        ValueError: If the module is neither.
    """
    latent_dim, classes = getattr(module, "latent_dim", None), getattr(module, "num_classes", None)
    given = getattr(module, "example_input_array", None)
    if given is not None:
        return tuple(given) if isinstance(given, tuple | list) else (given,)
    if latent_dim is None:
        raise ValueError(
            f"{type(module).__name__} has no latent_dim, so what its generator is called with is unknown: set its "
            "example_input_array, as Lightning has it, to such a tensor, or to a tuple of the arguments."
        )
    noise = torch.randn(batch, latent_dim, generator=torch.Generator().manual_seed(0))
    return (noise,) if classes is None else (noise, torch.arange(batch) % classes)


@torch.no_grad()
def infer_inputs(module: nn.Module, generator: nn.Module) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What a generator and its discriminator are called with, on the generator's device.

    A discriminator is taken to be called with what the generator gives, and, after that, with what the generator is
    called with after its first argument, such as labels.

    Raises:
        ValueError: If the module has no example, or the generator cannot be called with it.
    """
    device = next(generator.parameters()).device
    inputs = tuple(v.to(device) if isinstance(v, Tensor) else v for v in get_generator_inputs(module))
    with eval_mode(generator), isolate_rng(include_cuda=device.type == "cuda"):
        try:
            fake = generator(*inputs)
        except Exception as error:  # whatever somebody's network meets
            raise ValueError(f"the generator cannot be called with the module's example: {error}") from error
    return inputs, (fake, *inputs[1:])
