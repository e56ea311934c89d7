"""Results and logs of runs, small enough to work out what follows from them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from torch.utils.tensorboard import SummaryWriter

from lightning_ddst.report.results import (
    DecisionResults,
    FlopsResults,
    NetworkResults,
    PairResults,
    QualityResults,
    RunResults,
)

NETWORK = NetworkResults(
    initial_density=0.1, final_density=0.25, mean_density=0.2, active_weights=25, maskable_weights=100
)
RESULTS = RunResults(
    status="finished",
    seed=3,
    pairs={
        "": PairResults(
            method="ddst",
            settings={"generator_density": 0.1, "bounds": [0.2, 0.3], "growth": "random"},
            updates=20,
            planned_updates=20,
            networks={"generator": NETWORK, "discriminator": NETWORK},
            balance_ratio=0.5,
            decisions=[DecisionResults(update=10, action="grow", density=0.15, reason="BR 0.600 > 0.55")],
            flops=FlopsResults(training=30, measuring=5, dense=100, ratio=0.3),
        )
    },
    quality=[
        QualityResults(
            metric="frechet_distance", features="cnn", weights="average", values=[(0, 9.0), (20, 2.5)], real_halves=0.5
        ),
        QualityResults(metric="frechet_distance", features="cnn", weights="raw", values=[(20, 3.5)]),
    ],
    versions={"torch": "2.4.0"},
    command=["lightning-ddst", "fit"],
)


def paired(**changes: Any) -> RunResults:
    return replace(RESULTS, pairs={"": replace(RESULTS.pair, **changes)})


SCALARS = {
    "density/generator": [(10, 0.1), (20, 0.1)],
    "density/discriminator": [(10, 0.1), (20, 0.15)],
    "balance/ratio": [(10, 0.5)],
    "flops/training_ratio": [(20, 0.25)],
    "frechet_distance/cnn": [(0, 9.0), (20, 2.5)],
    "frechet_distance_raw/cnn": [(20, 3.5)],
    "loss": [(40, 1.0)],
}


def log_csv(folder: Path) -> Path:
    logger = CSVLogger(folder)
    for name, points in SCALARS.items():
        for step, value in points:
            logger.log_metrics({name: value}, step)
    logger.save()
    return Path(logger.log_dir)


def log_events(folder: Path) -> Path:
    with SummaryWriter(str(folder)) as writer:
        for name, points in SCALARS.items():
            for step, value in points:
                writer.add_scalar(name, value, step)
    return folder
