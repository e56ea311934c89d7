"""Checks that reject a run, and warnings about it: one function each."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Adam, AdamW

from lightning_ddst.balance import ScoresItself
from lightning_ddst.methods import Method, Role, SparseTraining
from lightning_ddst.methods.masked_pair import MaskedPair
from lightning_ddst.sparsity.bitpack import pack_bits
from lightning_ddst.sparsity.sharding import local_part
from lightning_ddst.utils import distributed
from lightning_ddst.utils.states import check_tensors


def check_separate(pair: MaskedPair, others: Iterable[MaskedPair], module: nn.Module) -> None:
    """Checks that several pairs of one module share no weights and can be measured separately.

    Raises:
        ValueError: If a weight is in two pairs, or the module returns the scores of only one pair.
    """
    others = list(others)
    if others and isinstance(module, ScoresItself):
        raise ValueError(
            f"{type(module).__name__}.balance_scores gives the scores of one pair, and there are "
            f"{len(others) + 1} DynamicSparsityCallbacks."
        )
    own = {id(parameter) for network in pair.networks.values() for parameter in network.parameters.values()}
    for other in others:
        for role, network in other.networks.items():
            if any(id(parameter) in own for parameter in network.parameters.values()):
                raise ValueError(f"two DynamicSparsityCallbacks mask the same {role}; each weight has one mask.")


def check_method(saved: Mapping[str, Any], method: Method) -> None:
    """Checks that a state is of a run with the same method.

    Args:
        saved: The state that a run saved; may be empty.
        method: The method of the run that resumes.

    Raises:
        ValueError: If the run had another method.
    """
    before = saved.get("method", method.name)
    if before != method.name:
        raise ValueError(
            f'the checkpoint is of a run with method="{before}", and this one has method="{method.name}". {_RESTART}'
        )


_RESTART = (
    "To start another run from its weights, load only these; in a Trainer, load them into the module and fit without "
    "ckpt_path."
)
_FIXED = (
    *("generator_density", "discriminator_density", "granularity"),
    *("dense_layers", "masked_parameters", "layer_densities"),
)
"""Arguments that decide which weights are masked, and how many; a run keeps them."""


def check_settings(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Compares the arguments of a callback that resumes with those of the run that saved the checkpoint.

    An argument that differs takes effect, and one warning names it with both values.

    Args:
        saved: The arguments by name in the checkpoint.
        present: The arguments by name of the callback that resumes.

    Raises:
        ValueError: For another density, granularity or choice of masked layers.
    """
    names = dict.fromkeys([*present, *saved]) if saved else {}
    changed = {name: present.get(name) for name in names if present.get(name) != saved.get(name)}
    for name in _FIXED:
        if name in changed:
            raise ValueError(
                f"{name}={changed[name]!r}: the run of the checkpoint has {name}={saved.get(name)!r}, and keeps it. "
                f"{_RESTART}"
            )
    if changed:
        words = ", ".join(f"{name}={value!r} (before: {saved.get(name)!r})" for name, value in changed.items())
        distributed.warn(f"the run resumes with other settings: {words}.")


def check_limits(state: Mapping[str, Any], method: Method) -> None:
    """Checks that the discriminator's density in a checkpoint is within the limits of a method that has others.

    Args:
        state: The state returned by `AttachedTraining.state_dict`.
        method: The method of the run that resumes.

    Raises:
        ValueError: If it is above the new maximum or below the new minimum.
    """
    density = state["networks"]["discriminator"]["target"]
    lowest, highest = method.lowest_densities["discriminator"], getattr(method, "max_discriminator_density", 1.0)
    for name, limit, outside in (
        ("min_discriminator_density", lowest, density < lowest),
        ("max_discriminator_density", highest, density > highest),
    ):
        if outside and getattr(method, name, None) != state["settings"].get(name):
            raise ValueError(
                f"{name}={limit}: the discriminator of the checkpoint has the density {density:g}, outside this limit. "
                f"Resume with {name}={state['settings'].get(name)}, as before, or with a limit that allows it."
            )


def check_not_overwritten(overwritten: bool) -> None:
    """Checks that a module still has the weights of the last fit, to which its masks belong.

    Raises:
        ValueError: If the Trainer has loaded a checkpoint into it since, for an evaluation or a fit that was rejected.
    """
    if overwritten:
        raise ValueError(
            "ckpt_path: since the last fit a checkpoint was loaded into this module, and the masks do not belong to "
            "its weights. Resume from a checkpoint, fit(..., ckpt_path=...), or start another run from the weights "
            "with a new DynamicSparsityCallback."
        )


def check_masks(module: nn.Module, networks: Mapping[Role, nn.Module], saved: Mapping[Role, Mapping[str, Any]]) -> None:
    """Checks that saved masks are of two networks, and that what is saved with them is of the same weights.

    Args:
        module: The module that holds the networks.
        networks: The networks.
        saved: The state returned by `MaskedPair.state_dict`.

    Raises:
        ValueError: For masks of other weights, and for parts that do not fit together.
    """
    full = {id(parameter): name for name, parameter in module.named_parameters()}
    for role, network in networks.items():
        state = saved[role]
        check_tensors(f"the {role}'s masks", state["masks"], dict(network.named_parameters()), complete=False)
        bits = {name: pack_bits(mask) for name, mask in state["masks"].items()}
        check_tensors(f"networks.{role}.ever", state["ever"], bits)
        names = {name: full[id(parameter)] for name, parameter in network.named_parameters() if name in bits}
        if state["names"] != names:
            raise ValueError(f"networks.{role}.names must be the names of its weights, {', '.join(names.values())}.")


def check_finite_weights(pair: MaskedPair) -> None:
    """Checks that all weights of both networks are finite, and no buffer has NaN (attention's masks have infinities).

    Raises:
        ValueError: If one is not; names its layer.
    """
    for role, network in pair.networks.items():
        bad = [
            *(n for n, p in network.network.named_parameters() if not bool(local_part(p.detach()).isfinite().all())),
            *(n for n, b in network.network.named_buffers() if bool(local_part(b).isnan().any())),
        ]
        if bad:
            raise ValueError(f"the {role}'s {bad[0]!r} has values that are not finite before training starts.")


_WARN_BELOW = 0.9
"""Share of a network's weights that can be masked, below which a warning names others."""
_NAMED = 5
"""Number of weights that the warning names."""


def warn_of_unmasked(pair: MaskedPair, training: SparseTraining) -> None:
    """Warns if less than 90 % of the weights of a network with masks can be masked; names the largest others.

    Weights are parameters of two or more dimensions, without those of layers in ``dense_layers``.
    """
    for role, network in pair.networks.items():
        share = network.maskable_share()
        if share < _WARN_BELOW and training.is_masked(role):
            largest = sorted(network.dense_weights().items(), key=lambda named: -named[1].numel())[:_NAMED]
            names = ", ".join(
                f"{network.full_name(name)!r} {tuple(parameter.shape)}{'' if parameter.requires_grad else ' (frozen)'}"
                for name, parameter in largest
            )
            distributed.warn(
                f"only {share:.1%} of the {role}'s weights are maskable, and its density counts these alone. "
                f"The largest that stay dense: {names}. To mask them, name their dimensions in "
                "masked_parameters={pattern: (out_dim, in_dim)}; to leave them dense, name them in dense_layers."
            )


_LARGE_STEPS = 5.0
"""Learning rates above which the largest step of a grown weight brings a warning; the paper's betas give 3.2."""
_SIMULATED = 5000
"""Steps among which the largest is searched."""


def warn_of_large_steps(pair: MaskedPair, training: SparseTraining) -> None:
    """Warns if Adam's betas let weights that grow make large first steps.

    A grown weight starts with moments of 0, but Adam corrects their bias by the number of all steps so far.
    """
    growing = {role for update in training.mask_updates if update.grows for role in update.roles}
    steps: dict[Role, tuple[float, tuple[float, float]]] = {}
    for role, network in pair.networks.items():
        if role in growing and training.is_masked(role):
            weights = {id(parameter) for parameter in network.parameters.values()}
            for optimizer in training.optimizers:
                for group in optimizer.param_groups if isinstance(optimizer, Adam | AdamW) else ():
                    if any(id(parameter) in weights for parameter in group["params"]):
                        betas = (float(group["betas"][0]), float(group["betas"][1]))
                        steps[role] = max(steps.get(role, (0.0, betas)), (largest_step(*betas), betas))
    large = [
        f"up to {step:.1f} learning rates for about {1 / (1 - betas[1]):,.0f} updates with the {role}'s "
        f"betas=({betas[0]:g}, {betas[1]:g})"
        for role, (step, betas) in steps.items()
        if step > _LARGE_STEPS
    ]
    if large:
        distributed.warn(
            "a weight that grows starts with fresh optimizer state, and Adam's first steps with it are large: "
            f"{', '.join(large)}. Use a smaller second beta in dynamic sparse training: the paper's betas=(0, 0.9) "
            "give 3.2."
        )


def largest_step(beta1: float, beta2: float) -> float:
    """Returns the largest step, in learning rates, that Adam makes with a weight whose moments were reset to 0.

    At a constant gradient the n-th step is ``(1 - beta1**n) / sqrt(1 - beta2**n)`` learning rates, once the bias
    correction of a long run is over.

    Args:
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
    """
    return max((1 - beta1**n) / math.sqrt(1 - beta2**n) for n in range(1, _SIMULATED))


def check_unlimited(method: Method, unknown: str) -> None:
    """Checks that a method works in a run of unknown length, and warns that the exploration rate stays constant.

    Args:
        method: The method.
        unknown: The sentence that explains why the length is unknown.

    Raises:
        ValueError: If the method needs the run's length.
    """
    if method.needs_run_length:
        raise ValueError(f'{unknown}, and method="{method.name}" needs the run\'s length.')
    if method.mask_updates():
        distributed.warn(f"{unknown}: the exploration rate stays constant.")


def is_same(ones: Sequence[object], others: Sequence[object]) -> bool:
    """Returns whether two sequences hold the same objects in the same order."""
    return len(ones) == len(others) and all(one is other for one, other in zip(ones, others, strict=True))


def check_unchanged(pair: MaskedPair) -> None:
    """Checks that networks have the weights that were masked, no others, and inactive ones at 0.

    Raises:
        RuntimeError: If a weight was replaced or added, or something else wrote into inactive ones; names it.
    """
    held = {id(parameter) for parameter in pair.module.parameters()}
    for role, network in pair.networks.items():
        present = dict(network.network.named_parameters())
        for name, parameter in network.parameters.items():
            if present.get(name) is not parameter or id(parameter) not in held:
                raise RuntimeError(
                    f"the {role}'s weight {name!r} was replaced since it was masked, so its mask is of another "
                    "weight. Change layers before training starts."
                )
        if added := network.unmasked():
            raise RuntimeError(
                f"the {role} has weights that came since it was masked and have no mask: "
                f"{', '.join(map(network.full_name, added))}. Add "
                "layers before training starts, or name them in dense_layers."
            )
        if written := network.written():
            raise RuntimeError(
                f"something else than the optimizers wrote into inactive weights of the {role}: {', '.join(written)}. "
                "A callback, the module or the loop does, after the step; masks and densities no longer hold."
            )
