"""Operations as the paper counts them, for comparison with its tables.

`TrainingFlops` counts the operations that training really executes. In the authors' code

- an operation is a multiplication with its addition; biases and the scales and shifts of BatchNorm
  count, transposed convolutions do not, and groups are ignored;
- a backward pass costs two forward passes; in the discriminator's updates only the real images count;
- the discriminator's operations are multiplied twice by its updates per generator update;
- dense gradients and the measurement of the balance ratio cost nothing.

Counted like this, dense SNGAN on CIFAR-10 takes the published 2.67e17 operations if the generator is trained with
batches of 128. With batches of 64, the discriminator's batch size, the result is 2.26e17.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_ddst.sparsity.maskable import maskable_weights
from lightning_ddst.utils.modules import eval_mode, remove_hooks


def published_flops(network: nn.Module, *inputs: Tensor, densities: Mapping[str, float] | None = None) -> float:
    """Counts the operations of one forward pass.

    Args:
        network: The network; it is called once, in evaluation mode, without gradients.
        inputs: Its arguments for one image.
        densities: Densities of its weights by their names in ``network.named_parameters()``; 1 for missing names.

    Raises:
        ValueError: If a name in `densities` is not a maskable weight of the network.
    """
    maskable = [weight for weight in maskable_weights(network) if weight.tensor == "weight"]
    weights = {layer: weight for weight in maskable for layer in weight.layers.values()}
    densities = densities or {}
    if unknown := densities.keys() - {weight.name for weight in weights.values()}:
        raise ValueError(f"densities: {min(unknown)!r} is no maskable weight of {type(network).__name__}.")
    operations = 0.0

    def count(layer: nn.Module, _: object, output: Tensor) -> None:
        nonlocal operations
        if not isinstance(layer, nn.Linear | nn.Conv2d | nn.BatchNorm2d):
            return
        positions = output.shape[2:].numel()
        if isinstance(layer, nn.Linear | nn.Conv2d):
            groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
            density = densities.get(weights[layer].name, 1.0) if layer in weights else 1.0
            operations += density * layer.weight.numel() * groups * positions
            operations += 0 if layer.bias is None else layer.bias.numel() * positions
        elif layer.affine:
            operations += 2 * layer.num_features * positions

    handles = [layer.register_forward_hook(count) for layer in network.modules()]
    with remove_hooks(handles), eval_mode(network), torch.no_grad():
        network(*inputs)
    return operations


def published_training_flops(
    generator: float,
    discriminator: float,
    *,
    updates: int,
    discriminator_steps: int = 5,
    batch_size: int = 64,
    generator_batch_size: int = 128,
) -> float:
    """Computes the operations of a training run.

    Args:
        generator: Operations of the generator's forward pass for one image: the result of `published_flops` at its
            mean densities over the run.
        discriminator: Operations of the discriminator's forward pass, likewise.
        updates: Number of generator updates.
        discriminator_steps: Discriminator updates per generator update.
        batch_size: Real images per discriminator update.
        generator_batch_size: Generated images per generator update.
    """
    images = discriminator_steps * batch_size
    of_generator = generator * (images + 3 * generator_batch_size)
    of_discriminator = discriminator * discriminator_steps * (3 * images + generator_batch_size)
    return updates * (of_generator + of_discriminator)
