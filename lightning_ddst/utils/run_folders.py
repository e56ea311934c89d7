"""Folders of runs that end before they train."""

import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from lightning.pytorch.loggers import Logger

_PLAIN = ("config.yaml", "hparams.yaml", "results.json")
"""Files that the command, the loggers and a failed start write, besides TensorBoard's events."""


class NewRunFolders:
    """The folders that the loggers of a run are about to make.

    Args:
        loggers: The run's loggers, before they write. Those without a ``log_dir`` (online loggers) are left out.

    Attributes:
        paths: Log folders that do not exist yet, each followed by those of its parents that do not exist either.
    """

    def __init__(self, loggers: Iterable[Logger]) -> None:
        folders = [getattr(logger, "log_dir", None) for logger in loggers]
        self.paths = [
            [path for path in (Path(folder), *Path(folder).parents) if not path.exists()]
            for folder in folders
            if isinstance(folder, str)
        ]

    def remove_untrained(self) -> None:
        """Removes the folders that hold nothing but the files that this process writes before training.

        Call it after the loggers are closed. Folders that existed before, folders with any other file, and those that
        another process logs to are left as they are.
        """
        for folder, *parents in filter(None, self.paths):
            files = [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]
            if not all(path.parent == folder and _is_written_at_start(path.name) for path in files):
                continue
            with suppress(OSError):  # another process made a file in the meantime; rmdir removes empty folders only
                for path in files:
                    path.unlink()
                for path in sorted((path for path in folder.rglob("*")), reverse=True):
                    path.rmdir()
                for path in (folder, *parents):
                    path.rmdir()


def _is_written_at_start(name: str) -> bool:
    # TensorBoard names host and process: events.out.tfevents.TIME.HOST.PROCESS.NUMBER
    own = f".{socket.gethostname()}.{os.getpid()}."
    return name in _PLAIN or (name.startswith("events.out.tfevents.") and own in name)
