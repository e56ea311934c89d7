"""Result files: what is in benchmarks/results, a row a line, each with the versions and the machine it is from.

Two environment variables serve machines without a clone of the repository: RESULTS, another folder for the files, and
COMMIT, the commit that the code is from.
"""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGES = ("lightning_ddst", "torch", "lightning", "torchmetrics")


def path(study: str) -> Path:
    """The file that holds a study's rows."""
    return Path(os.environ.get("RESULTS", HERE / "results")) / f"{study}.jsonl"


def rows(study: str) -> list[dict[str, Any]]:
    """The rows that a study has."""
    lines = path(study).read_text().splitlines() if path(study).exists() else []
    return [json.loads(line) for line in lines]


def add(study: str, row: dict[str, Any]) -> None:
    """Appends a row."""
    path(study).parent.mkdir(parents=True, exist_ok=True)
    with path(study).open("a") as file:
        file.write(json.dumps(row) + "\n")


def origin() -> dict[str, Any]:
    """Returns the versions, commit and machine that every row names."""
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "machine": machine(),
    }


def commit() -> str:
    """Returns the repository's commit, with "-dirty" if a file differs, results aside."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def machine() -> str:
    """The kind of machine: a GPU's name, or the CPU's architecture."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
