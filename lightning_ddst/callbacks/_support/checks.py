"""Checks that reject a run, and warnings about it: one function each."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_ddst.balance import ScoresItself
from lightning_ddst.methods import Method, Role, SparseTraining
from lightning_ddst.methods.masked_pair import MaskedPair
from lightning_ddst.sparsity.bitpack import pack_bits
from lightning_ddst.sparsity.sharding import local_part
from lightning_ddst.utils.states import check_tensors


def check_separate(pair: MaskedPair, others: Iterable[MaskedPair], module: LightningModule) -> None:
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


def check_checkpoint(saved: Mapping[str, Any], key: str, method: Method, *, needs_masks: bool) -> None:
    """Checks that a run can resume from a checkpoint.

    Args:
        saved: The states of callbacks in the checkpoint, by their keys.
        key: The key of the callback that resumes.
        method: The method of the callback that resumes.
        needs_masks: Whether the checkpoint must hold masks.

    Raises:
        ValueError: If another method's run saved the checkpoint, or it holds no masks.
    """
    before = saved.get(key, {}).get("method", method.name)
    if before != method.name:
        raise ValueError(
            f'the checkpoint is of a run with method="{before}", and this one has method="{method.name}". To '
            "start another run from its weights, load them into the module and fit without ckpt_path."
        )
    if saved.get(key) or not needs_masks:
        return
    others = [other for other in saved if other.startswith(key.partition("{")[0])]
    raise ValueError(
        f"the checkpoint holds no masks for {key}"
        + (f", but for {', '.join(others)}. Name the same networks as in that run." if others else ".")
        + ' To start from its dense networks, set initial_masks="magnitude"; to start from its weights with '
        "random masks, load them into the module and fit without ckpt_path."
    )


_FIXED = ("generator_density", "discriminator_density", "granularity", "dense_layers", "layer_densities")
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
                f"{name}={changed[name]!r}: the run of the checkpoint has {name}={saved.get(name)!r}, and keeps it. To "
                "start another run from its weights, load them into the module and fit without ckpt_path."
            )
    if changed:
        words = ", ".join(f"{name}={value!r} (before: {saved.get(name)!r})" for name, value in changed.items())
        rank_zero_warn(f"the run resumes with other settings: {words}.")


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
    """Checks that all weights of both networks are finite.

    Raises:
        ValueError: If one is not; names its layer.
    """
    for role, network in pair.networks.items():
        for name, parameter in network.network.named_parameters():
            if not bool(local_part(parameter.detach()).isfinite().all()):
                raise ValueError(f"the {role}'s {name!r} has values that are not finite before training starts.")


def check_unlimited(method: Method, training: SparseTraining) -> None:
    """Checks that a method works in a run of unknown length, and warns that the exploration rate stays constant.

    Raises:
        ValueError: If the method needs the run's length.
    """
    unknown = (
        "none of max_epochs, max_steps and max_time limits this run, so its length in generator updates is unknown"
    )
    if method.needs_run_length:
        raise ValueError(f'{unknown}, and method="{method.name}" needs the run\'s length.')
    if training.mask_updates:
        rank_zero_warn(f"{unknown}: the exploration rate stays constant.")


def is_same(ones: Sequence[object], others: Sequence[object]) -> bool:
    """Returns whether two sequences hold the same objects in the same order."""
    return len(ones) == len(others) and all(one is other for one, other in zip(ones, others, strict=True))


def check_unchanged(pair: MaskedPair) -> None:
    """Checks that networks have the weights that were masked, no others, and inactive ones at 0.

    Raises:
        RuntimeError: If a weight was replaced or added, or something else wrote into inactive ones; names it.
    """
    for role, network in pair.networks.items():
        present = dict(network.network.named_parameters())
        for name, parameter in network.parameters.items():
            if present.get(name) is not parameter:
                raise RuntimeError(
                    f"the {role}'s weight {name!r} was replaced since fitting started, so its mask is of another "
                    "weight. Change layers before fitting, or fit again with a new DynamicSparsityCallback."
                )
        if added := network.unmasked():
            raise RuntimeError(
                f"the {role} has weights that came since fitting started and have no mask: {', '.join(added)}. Add "
                "layers before fitting, or name them in dense_layers."
            )
        if written := network.written():
            raise RuntimeError(
                f"something else than the optimizers wrote into inactive weights of the {role}: {', '.join(written)}. "
                "A callback or the module does, after the step; masks and densities no longer hold."
            )


def warn_of_raw_optimizers() -> None:
    """Warns that Lightning does not count optimizer steps."""
    rank_zero_warn(
        "the generator was updated but Trainer.global_step is still 0: the training step steps torch's own "
        "optimizers (trainer.optimizers, self.optimizers(use_pl_optimizer=False)), which Lightning does not "
        "count. ModelCheckpoint saves nothing until the run ends, and max_steps does not end it. Step the optimizers "
        "that self.optimizers() returns."
    )
