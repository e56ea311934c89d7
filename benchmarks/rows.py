"""Result files: what is in benchmarks/results, a row a line, each with the versions and the machine it is from."""

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGES = ("lightning_ddst", "torch", "lightning", "torchmetrics")


def path(study: str) -> Path:
    """The file that holds a study's rows."""
    return HERE / "results" / f"{study}.jsonl"


def rows(study: str) -> list[dict[str, Any]]:
    """The rows that a study has."""
    lines = path(study).read_text().splitlines() if path(study).exists() else []
    return [json.loads(line) for line in lines]


def add(study: str, row: dict[str, Any]) -> None:
    """Appends a row."""
    path(study).parent.mkdir(exist_ok=True)
    with path(study).open("a") as file:
        file.write(json.dumps(row) + "\n")


def origin() -> dict[str, Any]:
    """What every row says of where it is from."""
    described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "commit": described.stdout.strip(),
        "machine": machine(),
    }


def machine() -> str:
    """The kind of machine: a GPU's name, or the CPU's architecture."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
