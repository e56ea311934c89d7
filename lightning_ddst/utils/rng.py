"""The random states of training, in types that load with ``weights_only=True``."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_ddst.utils import distributed
from lightning_ddst.utils.lightning_private import (
    recount_batches,
    renew_train_iterator,
    resumes_mid_epoch,
    train_loaders,
)


def random_states() -> dict[str, Any]:
    """Returns this process's current random states of torch (every device), NumPy and Python."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  # users draw from it
    return {
        "torch": torch.get_rng_state(),
        "devices": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restores the states returned by `random_states`; ignores those of missing devices."""
    torch.set_rng_state(states["torch"].cpu())
    for device, state in zip(range(torch.cuda.device_count()), states["devices"], strict=False):
        torch.cuda.set_rng_state(state.cpu(), device)
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))


def resume_randomness(trainer: Trainer, states: Sequence[Mapping[str, Any]]) -> None:
    """Restores a checkpoint's random states when training starts, so that it resumes exactly.

    Args:
        trainer: The Trainer, which has restored its loops and asked the loaders for iterators.
        states: The states returned by `random_states` in each process.
    """
    recount_batches(trainer)
    stateful = all(hasattr(loader, "load_state_dict") for loader in train_loaders(trainer))
    if resumes_mid_epoch(trainer) and not stateful:
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        left = max(0, trainer.num_training_batches - batches)
        first = f"{left:.0f} " if left < math.inf else ""
        rank_zero_warn(
            f"the checkpoint was made after batch {batches} of an epoch, and the train loader cannot "
            f"resume there: the rest of the epoch is the first {first}batches of a new order, so it sees some images "
            "twice and others not at all. With another batch size or number of processes than before, the epoch also "
            "has another number of images. Resume from the end of an epoch, or use a loader with state_dict and "
            "load_state_dict (lightning_ddst.data.ResumableLoader)."
        )
    processes = distributed.get_world_size()
    if len(states) != processes:
        rank_zero_warn(
            f"the checkpoint holds the random states of {len(states)} processes, and there are {processes}: "
            "training resumes with other random numbers."
        )
        return
    set_random_states(states[distributed.get_rank()])
    renew_train_iterator(trainer)  # its first iterator drew from other random states
