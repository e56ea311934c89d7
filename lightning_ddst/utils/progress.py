"""Progress bars of slow work outside training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from tqdm import tqdm

_PATIENCE = 2.0  # seconds until a progress bar is shown


@contextmanager
def showing_progress(trainer: Trainer, what: str, total: int | None) -> Iterator[Callable[[int], object]]:
    """Shows a progress bar for slow work in the first process, if the Trainer shows its own; removes it at the end."""
    bar = trainer.progress_bar_callback
    shown = trainer.is_global_zero and bar is not None and getattr(bar, "is_enabled", True)
    with tqdm(desc=what, total=total, leave=False, delay=_PATIENCE, disable=None if shown else True) as progress:
        yield progress.update
