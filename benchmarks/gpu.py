"""Measures on a GPU, in a fixed order and a given time, what training costs there.

    python benchmarks/gpu.py [--minutes 14] [--authors CLONE] [--rigl-torch CLONE] [--sparsimony CLONE]
    OMP_NUM_THREADS=1 RESULTS=/tmp/rehearsal python benchmarks/gpu.py --rehearse

The tests that need a GPU; training steps by kind of update, with masks and averages (overhead.py); mask updates
(mask_update.py); masks of channels (smaller.py). Every measurement adds its rows when it ends, and one that ended on
this machine with this commit is not repeated, so a second call resumes. None starts that is expected to end after the
time, and none with torch.compile that would leave too little for those after it. A failure does not stop the others.

`--rehearse` runs everything on a CPU with narrow networks, to see that it runs.
"""

import argparse
import gc
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mask_update
import overhead
import peers
import smaller
from kinds import EXPLORATION, GROWS
from overhead import Setting
from rows import HERE, add, commit, machine, origin, rows

CHANGES = 8
"""Mask changes of each kind in a measurement of steps; 46 updates of each run."""


@dataclass(frozen=True)
class Measurement:
    """A part of the session.

    Attributes:
        name: Unique.
        seconds: Expected on an H200.
        measure: Measures and adds rows.
        optional: Whether those after it matter more.
    """

    name: str
    seconds: float
    measure: Callable[[], object]
    optional: bool = False


def tests() -> None:
    """Runs the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-rf", "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=HERE.parent)
    if done.returncode:
        raise RuntimeError(f"tests/test_gpu.py ended with {done.returncode}")


def measurements(clones: dict[str, Any], rehearse: bool) -> Iterator[Measurement]:
    """All of them, in order."""
    accelerator, changes = ("cpu", 2) if rehearse else ("gpu", CHANGES)
    narrow = {"width": 4, "batch_size": 2} if rehearse else {}
    yield Measurement("tests", 100, tests)
    for compiled in ("", "aot_eager" if rehearse else "inductor"):
        for pair in ("SNGAN", "BigGAN"):
            for precision in ("32-true", "bf16-mixed"):
                for steps in (1, 5):
                    setting = replace(Setting(pair, steps, accelerator, precision, compiled), **narrow)
                    # Each run compiles its networks, so compiled ones are as few as possible.
                    only = (EXPLORATION, GROWS) if compiled else None
                    yield Measurement(
                        setting.command,
                        (15 if steps == 1 else 30) + 60 * bool(compiled),
                        partial(overhead.compare_kinds, setting, changes, only),
                        optional=bool(compiled),
                    )
    for millions in (1,) if rehearse else (1, 10, 100):
        yield Measurement(
            f"mask update of {millions} million weights",
            10 + 0.4 * millions,
            partial(mask_update.compare, millions, clones, accelerator),
        )
    for density in (0.1, 0.3, 0.5):
        setting = replace(Setting("SNGAN", 1, accelerator), **narrow)
        updates = 5 if rehearse else 50
        yield Measurement(
            f"masks of channels at {density:.0%}",
            12,
            partial(smaller.compare, density, setting, updates),
        )


def choose(waiting: Sequence[Measurement], left: float) -> Measurement | None:
    """The first measurement that fits into the seconds left, together with those after it that are not optional."""
    for number, each in enumerate(waiting):
        later = sum(other.seconds for other in waiting[number + 1 :] if not other.optional) if each.optional else 0.0
        if each.seconds + later <= left:
            return each
    return None


def run(waiting: list[Measurement], seconds: float) -> None:
    """Makes the measurements that fit, one after the other."""
    end = time.monotonic() + seconds
    while chosen := choose(waiting, end - time.monotonic()):
        waiting.remove(chosen)
        start = time.monotonic()
        print(f"\n{chosen.name}: {end - start:.0f} s left", flush=True)
        failed = ""
        try:
            chosen.measure()
        except Exception as error:
            traceback.print_exc()
            failed = f"{type(error).__name__}: {error}"
        row = {"what": chosen.name, "failed": failed, "seconds": round(time.monotonic() - start, 1)}
        add("gpu", row | origin())
        gc.collect()
    for each in waiting:
        print(f"left out, for lack of time: {each.name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers.add_arguments(parser)
    parser.add_argument("--minutes", type=float, default=14.0, help="for everything")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with narrow networks")
    options = vars(parser.parse_args())
    overhead.prepare()
    every = {peer: options[peer.replace("-", "_")] for peer in peers.PEERS}
    clones = {peer: clone for peer, clone in every.items() if clone is not None}
    here = (machine(), commit())
    done = {row["what"] for row in rows("gpu") if (row["machine"], row["commit"]) == here and not row["failed"]}
    found = measurements(clones, options["rehearse"])
    run([each for each in found if each.name not in done], 60 * options["minutes"])


if __name__ == "__main__":
    main()
