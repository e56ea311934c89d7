"""The runs of each study: what `lightning-ddst fit` is asked for, those that matter most first."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product

from lightning_ddst.balance import SIGNALS

BAND = SIGNALS["balance_ratio"].bounds
"""The bounds of BR that DDST uses."""
DENSITIES = (0.1, 0.3, 0.05, 0.2, 0.5)
"""Densities of the generator."""


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        setting: What it is trained on.
        run: How, by the name that tables have.
        density: The generator's; 1 for the dense pair.
        seed: Of everything.
        options: What `lightning-ddst fit` is asked for beside the seed.
    """

    setting: str
    run: str
    density: float
    seed: int
    options: str

    @property
    def key(self) -> tuple[str, str, float, int]:
        """Its key in the study."""
        return self.setting, self.run, self.density, self.seed

    @property
    def command(self) -> str:
        """The command that trains it."""
        return f"lightning-ddst fit {self.options} --seed_everything {self.seed}"


def _once(cells: Iterable[Cell]) -> list[Cell]:
    """Returns every cell once, at its first rank."""
    return list({cell.key: cell for cell in cells}.values())


# ---- Fashion-MNIST -------------------------------------------------------------------------------------

FASHION = {
    "60,000 images": "--config benchmarks/fashion.yaml",
    "300 images": "--config benchmarks/fashion.yaml --data.init_args.images 300",
    "100 images": "--config benchmarks/fashion.yaml --data.init_args.images 100",
    "1,000 images": "--config benchmarks/fashion.yaml --data.init_args.images 1000",
}
_EXPLORES = "--sparsity.method ddst --sparsity.bounds [0,1.0e-6]"  # BR is always above: it explores at its maximum
_FIXED = "--sparsity.discriminator_density {matched} --sparsity.max_discriminator_density {matched}"
_LEARNING_RATE = "--model.init_args.discriminator_optimizer.init_args.lr"

MATCHED = {
    ("60,000 images", 0.1): 0.35,
    ("300 images", 0.1): 0.25,
    ("60,000 images", 0.3): 0.8,
    ("60,000 images", 0.05): 0.2,
    ("60,000 images", 0.2): 0.75,
    ("60,000 images", 0.5): 0.9,
    ("100 images", 0.1): 0.15,
    ("1,000 images", 0.1): 0.25,
    ("300 images", 0.3): 0.6,
    ("300 images", 0.05): 0.2,
    ("300 images", 0.2): 0.45,
    ("300 images", 0.5): 0.9,
}
"""About the discriminator's mean density in trial runs of DDST (studies "matching" and "rules", results/trials.jsonl).

With a generator at 5 % that was 0.05, and the runs failed; 0.2 is what did best in the study "floors".
"""

METHODS: dict[str, str] = {
    "DDST auto": "--config ddst_relaxed --sparsity.bounds auto",
    "DDST relaxed": "--config ddst_relaxed",
    "ramp": "--config ramp",
    "ramp to 0.5": "--config ramp --sparsity.max_discriminator_density 0.5",
    "RigL, D explores at a fixed density": f"{_EXPLORES} {_FIXED}",
    "RigL, strong D": "--config sdst_rigl_strong",
    "DDST strict": "--config ddst_strict --sparsity.interval 100",
    "RigL, balanced D": "--config sdst_rigl_balanced",
    "SET, strong D": "--config sdst_set_strong",
    "SET, balanced D": "--config sdst_set_balanced",
    "static, strong D": "--config static_strong",
    "static, balanced D": "--config static_balanced",
    "RigL, strong D, twice its learning rate": f"--config sdst_rigl_strong {_LEARNING_RATE} 2.0e-3",
}
FIXED = tuple(run for run in METHODS if "DDST " not in run and "ramp" not in run)
"""Runs whose discriminator keeps its density."""
UNCONTROLLED = ("dense", "static", "SET", "RigL", "ramp", "channels, a smaller pair")
"""First words of the names of runs that do not use BR."""
CLAIMS = tuple(METHODS)[:6]
"""The runs that the claim is judged by: DDST and its competitors."""
*EVERYWHERE, _ONCE = METHODS
"""All but the last: other learning rates are no better (the study "rates")."""


def _options(
    base: str, setting: str, run: str, density: float, matched: Mapping[tuple[str, float], float] = MATCHED
) -> str:
    """Returns the options of a method in a setting."""
    method = METHODS[run].format(matched=matched.get((setting, density), ""))
    return f"{base} {method} --sparsity.generator_density {density}"


def fashion() -> list[Cell]:
    """Round by round, so that what is done can be compared at any time."""

    def cells(
        settings: Iterable[str], densities: Iterable[float], runs: Iterable[str], seeds: Iterable[int]
    ) -> list[Cell]:
        return [
            Cell(setting, run, density, seed, _options(FASHION[setting], setting, run, density))
            for seed, setting, density, run in product(seeds, settings, densities, runs)
        ]

    def dense(settings: Iterable[str], seeds: Iterable[int]) -> list[Cell]:
        return [Cell(s, "dense", 1.0, seed, f"{FASHION[s]} --config dense") for seed, s in product(seeds, settings)]

    large, few, *others = FASHION
    first, second, *rest = DENSITIES
    judged, strong = CLAIMS[:5], ["RigL, strong D", "RigL, balanced D"]
    rounds = cells([large], [first], (*CLAIMS, _ONCE), range(3))
    for seed in range(3):  # every density and every number of images, before more of any
        rounds += cells([large], DENSITIES, judged, [seed]) + cells([few, *others], [first], judged, [seed])
    rounds += cells([large], [first, second], judged, range(3, 5)) + cells([few], [first], judged, range(3, 5))
    rounds += cells([large], DENSITIES, strong, range(3)) + cells([few, *others], [first], strong, range(3))
    rounds += dense([large], range(3)) + cells([large], [first, second], EVERYWHERE, range(3))
    rounds += cells([few], [second, *rest], judged, range(3))
    rounds += cells([large, few], [first], CLAIMS, range(5)) + cells([large], [second], CLAIMS, range(5))
    rounds += cells([large], rest, EVERYWHERE, range(3)) + cells([few, *others], [first], EVERYWHERE, range(3))
    rounds += dense(FASHION, range(3)) + cells([few], [second], CLAIMS, range(5))
    rounds += cells([few], [second, *rest], EVERYWHERE, range(3))
    return _once(rounds)


def matching() -> list[Cell]:
    """Returns trials that show the density that DDST reaches, which `MATCHED` is from, on a seed of their own."""
    large, few, *others = FASHION
    first, second, *rest = DENSITIES
    places = [(large, density) for density in rest] + [(setting, first) for setting in others]
    places += [(few, density) for density in (second, *rest)]
    run = "DDST relaxed"
    return [Cell(s, run, density, 10, _options(FASHION[s], s, run, density)) for s, density in places]


FLOORS = (0.1, 0.2, 0.3)
"""Lower limits of the discriminator's density, and where it starts, that were tried."""


def floors() -> list[Cell]:
    """DDST whose discriminator starts at a floor above the generator's density, where that is low."""
    setting = next(iter(FASHION))

    def cell(density: float, floor: float, name: str, seed: int) -> Cell:
        limits = f"--sparsity.discriminator_density {floor} --sparsity.min_discriminator_density {floor}"
        options = f"{_options(FASHION[setting], setting, 'DDST relaxed', density)} {limits}"
        return Cell(setting, f"DDST relaxed, D from {name}", density, seed, options)

    cells = []
    for seed in (10, 11):
        cells += [cell(0.05, floor, str(floor), seed) for floor in FLOORS] + [cell(0.1, 0.2, "0.2", seed)]
        for density in (0.05, 0.1):
            cells.append(Cell(setting, "ramp", density, seed, _options(FASHION[setting], setting, "ramp", density)))
            cells.append(cell(density, density, "the generator's", seed))
    return cells + [cell(density, 0.2, "0.2", seed) for seed, density in product(range(3), (0.05, 0.1))]


_DENSITY = "--sparsity.generator_density {density}"
_SELDOM = " --sparsity.probe_interval 5"


def _controlled(controller: str, **arguments: object) -> str:
    """DDST with a controller of its own; the generator's density is left open."""
    option = "--sparsity.method.controller"
    given = [f"{option}.{name} {value}" for name, value in arguments.items()]
    method = "--sparsity.method lightning_ddst.methods.DDST --sparsity.method.generator_density {density}"
    return " ".join([method, option, controller, *given])


def _brake(lower: float, upper: float, explores: str, delta: float = 0.03, more: str = "") -> str:
    shares = {"lower": lower, "upper": upper, "explores": explores}
    return _controlled("variants.Brake", **shares, min_density="{density}", delta=delta) + more


RULES: dict[str, str] = {
    "DDST auto": f"{METHODS['DDST auto']} {_DENSITY}",
    "DDST auto, even at 0.6": _controlled(
        "lightning_ddst.balance.RelativeController", limits="[{density},1.0]", steady=0.6
    ),
    "brake, 0.6 to 0.9, steps of 0.05, masks kept": _brake(0.6, 0.9, "false", 0.05),
    "brake, 0.6 to 0.9, masks kept": _brake(0.6, 0.9, "false"),
    "ramp": f"{METHODS['ramp']} {_DENSITY}",
    "ramp to 0.5": f"{METHODS['ramp to 0.5']} {_DENSITY}",
    "DDST relaxed": f"{METHODS['DDST relaxed']} {_DENSITY}",
    "brake, 0.6 to 0.75": _brake(0.6, 0.75, "true"),
    "brake, 0.75 to 0.9": _brake(0.75, 0.9, "true"),
    "DDST that explores": _controlled("variants.ExploresInBand", min_density="{density}", limits="true"),
    "brake, 0.6 to 0.75, masks kept": _brake(0.6, 0.75, "false"),
    "brake, 0.75 to 0.9, steps of 0.02, BR every 5th update": _brake(0.75, 0.9, "true", 0.02, _SELDOM),
    "brake, 0.75 to 0.9, masks kept, BR every 5th update": _brake(0.75, 0.9, "false", more=_SELDOM),
}
"""Rules of control that were tried."""
CANDIDATES = tuple(RULES)[:2]
"""The last two candidates."""


def rules() -> list[Cell]:
    """Ways of control, where the right discriminators differ, on seeds that choices were made by."""
    large, few, fewest, _ = FASHION
    places = ((large, 0.05), (fewest, 0.1), (large, 0.3), (large, 0.1), (few, 0.1))
    cells = list(product((10, 11), RULES, places))
    cells += product((12, 13), CANDIDATES, places[:1])  # where some have failed
    return [
        Cell(s, run, density, seed, f"{FASHION[s]} {RULES[run].format(density=density)}")
        for seed, run, (s, density) in cells
    ]


RATES = (5e-4, 1e-3, 2e-3, 4e-3)
"""Learning rates of a dense discriminator, that were tried; benchmarks/fashion.yaml has the second."""


def rates() -> list[Cell]:
    """Returns runs with a sparse generator, with many images and with few, on the seeds of trials."""
    large, few, *_ = FASHION
    return [
        Cell(
            setting,
            f"RigL, strong D at {rate:g}",
            DENSITIES[0],
            seed,
            f"{_options(FASHION[setting], setting, 'RigL, strong D', DENSITIES[0])} {_LEARNING_RATE} {rate:.1e}",
        )
        for seed, setting, rate in product((10, 11), (large, few), RATES)
    ]


UNBALANCED = {
    "D learns 4 times as fast": f"{_LEARNING_RATE} 4.0e-3",
    "D learns a quarter as fast": f"{_LEARNING_RATE} 2.5e-4",
}
"""Learning rates that unbalance a GAN: a fixed plan cannot know them, and feedback should answer them."""


def unbalanced() -> list[Cell]:
    """With the generator at 10 % and all images."""
    (large, base), density = next(iter(FASHION.items())), DENSITIES[0]
    runs = (*CLAIMS[:4], "RigL, strong D")
    return [
        Cell(setting, run, density, seed, f"{_options(base, large, run, density)} {change}")
        for seed, (setting, change), run in product(range(3), UNBALANCED.items(), runs)
    ]


# ---- ablations -----------------------------------------------------------------------------------------

ABLATIONS: dict[str, str] = {
    "nothing": "",
    "random growth": "--sparsity.growth random",
    "momentum growth": "--sparsity.growth momentum",
    "steps of 0.1": "--sparsity.delta 0.1",
    "intervals twice as long": "--sparsity.interval 200 --sparsity.explore_interval 100 --sparsity.probe_interval 4",
    "BR every 10th update": "--sparsity.probe_interval 10",
    "mean of ratios": "--sparsity.estimator mean_of_ratios",
    "optimizer state kept": "--sparsity.optimizer_state keep",
    "plain average": "--config benchmarks/plain_average.yaml",
}
"""Changes of DDST relaxed."""

ESTIMATED = ("RigL, balanced D", "RigL, strong D")
"""Runs whose BR is estimated in both ways; nothing depends on it, so both runs are identical."""


def ablations() -> list[Cell]:
    """With the generator at 10 % and all images; unchanged, too, to be compared within one machine and version."""
    (setting, base), density = next(iter(FASHION.items())), DENSITIES[0]

    def changed(run: str, name: str, change: str, seed: int) -> Cell:
        return Cell(setting, name, density, seed, f"{_options(base, setting, run, density)} {change}")

    cells = [changed(run, f"{run}, mean of ratios", ABLATIONS["mean of ratios"], 0) for run in ESTIMATED]
    for seed, (name, change) in product(range(3), ABLATIONS.items()):
        cells.append(changed("DDST relaxed", name, change, seed))
    return cells


# ---- wide networks -------------------------------------------------------------------------------------

_WIDTH = "--model.init_args.generator.init_args.width {0} --model.init_args.discriminator.init_args.width {0}"
LONGER = "60,000 images, 10,000 updates"
WIDE = {
    name: f"{base} {_WIDTH.format(24)}"
    for name, base in {**FASHION, LONGER: f"{FASHION['60,000 images']} --trainer.max_epochs 10"}.items()
}
"""With 265,000 weights in the generator and 240,000 in the discriminator; 150 seconds per run on a free core."""
WIDE_CHANGES: dict[str, str] = {
    "regrown weights kept": "--sparsity.regrown keep",
    "regrown weights reset": "--sparsity.regrown reset",
}
"""Changes of DDST relaxed."""


def wide_trials() -> list[Cell]:
    """Returns the trials that settings of the study "wide" are chosen by, on seeds that none of its rows has."""
    setting = next(iter(WIDE))
    return [
        Cell(setting, name, density, seed, f"{_options(WIDE[setting], setting, 'DDST relaxed', density)} {change}")
        for seed, density, (name, change) in product((10, 11), (0.05, 0.1), WIDE_CHANGES.items())
    ]


WIDE_MATCHED = {("60,000 images", 0.05): 0.5, ("60,000 images", 0.1): 0.7}
"""About the discriminator's mean density in the trials of DDST relaxed (results/wide_trials.jsonl)."""
WIDE_CLAIMED = (0.05, 0.1)
"""Densities of the generator that the claim is judged by, with five seeds."""
WIDE_RUNS = (
    *("DDST relaxed", "ramp", "ramp to 0.5", "RigL, strong D", "RigL, D explores at a fixed density"),
    *("DDST auto", "RigL, balanced D", "DDST strict"),
)


def wide() -> list[Cell]:
    """Wide networks, those cells first in which the discriminator's density matters most."""
    large, few, *_ = WIDE

    def cells(setting: str, density: float, runs: Iterable[str], seed: int) -> list[Cell]:
        return [
            Cell(setting, run, density, seed, _options(WIDE[setting], setting, run, density, WIDE_MATCHED))
            for run in runs
            if "fixed density" not in run or (setting, density) in WIDE_MATCHED
        ]

    rounds: list[Cell] = []
    for seed in range(3):
        for density in WIDE_CLAIMED:
            rounds += cells(large, density, WIDE_RUNS, seed)
        rounds.append(Cell(large, "dense", 1.0, seed, f"{WIDE[large]} --config dense"))
    for seed in range(3):
        rounds += cells(large, 0.2, WIDE_RUNS, seed) + cells(few, 0.1, WIDE_RUNS, seed)
        rounds += cells(large, 0.02, ("DDST relaxed", "DDST auto", "ramp", "ramp to 0.5"), seed)
        rounds.append(Cell(few, "dense", 1.0, seed, f"{WIDE[few]} --config dense"))
    for seed, density in product((3, 4), WIDE_CLAIMED):
        rounds += cells(large, density, WIDE_RUNS[:6], seed)
    for seed in range(3):
        rounds += cells(LONGER, 0.05, ("DDST auto", "ramp to 0.5", "RigL, strong D"), seed)
    return rounds


SCALED_RUNS = ("DDST relaxed", "ramp to 0.5", "RigL, strong D", "DDST auto")


SIZES = {6: (21174, 15126), 12: (72300, 60204), 24: (264408, 240216), 48: (1008048, 959664)}
"""Maskable weights of generator and discriminator by width; the study "scaling" has all but 24, which "wide" has."""


def scaling() -> list[Cell]:
    """Returns the runs of Fashion-MNIST at other widths, narrow networks first."""
    large = next(iter(FASHION))
    return [
        Cell(
            f"width {width}",
            run,
            density,
            seed,
            _options(f"{FASHION[large]} {_WIDTH.format(width)}", large, run, density),
        )
        for width, seed, density, run in product(SIZES, range(2), (0.05, 0.1), SCALED_RUNS)
        if width != 24
    ]


WIDE_ABLATIONS: dict[str, str] = {
    "BR every 10th update": "--sparsity.probe_interval 10",
    "BR every 50th update": "--sparsity.probe_interval 50",
    "steps of 0.1": "--sparsity.delta 0.1",
    "D from 0.2": "--sparsity.discriminator_density 0.2 --sparsity.min_discriminator_density 0.2",
    "optimizer state kept": "--sparsity.optimizer_state keep",
    "regrown weights kept": WIDE_CHANGES["regrown weights kept"],
}
"""Changes of DDST relaxed, which the study "wide" has unchanged: BR every 2nd update, steps of 0.05."""


def wide_ablations() -> list[Cell]:
    """Returns the ablations at width 24, with the generator at 5 % and all images."""
    setting, density = next(iter(WIDE)), 0.05
    unchanged = _options(WIDE[setting], setting, "DDST relaxed", density)
    return [
        Cell(setting, name, density, seed, f"{unchanged} {change}")
        for seed, (name, change) in product(range(2), WIDE_ABLATIONS.items())
    ]


def _rising(floor: float) -> str:
    return _controlled("variants.RisingFloor", min_density="{density}", floor=floor)


CONTROLLERS: dict[str, str] = {
    "DDST, floor rises to 0.5": _rising(0.5),
    "DDST, floor rises to 0.3": _rising(0.3),
    "DDST auto to 0.5": f"{METHODS['DDST auto']} {_DENSITY} --sparsity.max_discriminator_density 0.5",
    "DDST, grows while alpha is low": _controlled("variants.GrowsWithoutGap", min_density="{density}"),
    "ramp to 0.5": RULES["ramp to 0.5"],
    "DDST relaxed": RULES["DDST relaxed"],
    "DDST auto": RULES["DDST auto"],
}
"""Candidates for the default of control, and beside them what there is."""


def controllers() -> list[Cell]:
    """Returns the trials of the default of control, on seeds of their own: where it failed, and where it is best."""
    large = next(iter(FASHION))
    fast = f"{FASHION[large]} {UNBALANCED['D learns 4 times as fast']}"
    places = ((large, FASHION[large], 0.05), ("width 24", WIDE[large], 0.05), ("D learns 4 times as fast", fast, 0.1))
    return [
        Cell(setting, run, density, seed, f"{base} {options.format(density=density)}")
        for seed, (setting, base, density), (run, options) in product((10, 11), places, CONTROLLERS.items())
    ]


CIFAR_SMALL = "CIFAR-10, width 32"
CIFAR_SMALL_RUNS = ("DDST auto", "ramp to 0.5", "RigL, strong D", "DDST relaxed", "ramp")
"""Those that matter most in the study "wide"."""


def cifar10_small() -> list[Cell]:
    """Returns the runs of a narrow SNGAN on CIFAR-10 at 32 pixels, about 7 minutes each on a free core."""
    base = "--config benchmarks/cifar10_small.yaml"
    rounds = []
    for density, seed in product((0.1, 0.3), range(3)):
        rounds.append(Cell(CIFAR_SMALL, "dense", 1.0, seed, f"{base} --config dense"))
        for run in CIFAR_SMALL_RUNS:
            rounds.append(Cell(CIFAR_SMALL, run, density, seed, _options(base, CIFAR_SMALL, run, density)))
    return _once(rounds)


# ---- whole channels ------------------------------------------------------------------------------------

_WIDE = "--model.init_args.generator.init_args.width 16 --model.init_args.discriminator.init_args.width 16"
CHANNELS = {
    "weights": "--config ddst_relaxed",
    "channels": "--config ddst_relaxed --sparsity.granularity channel",
    "channels, a smaller pair": "--config static_balanced --sparsity.granularity channel",
}
"""Granularities of masks. With static, balanced masks of channels the pair is simply a smaller one."""
CHANNEL_RATES = (0.5, 0.2, 0.1, 0.05)
"""Drop fractions that were tried, on seeds of their own."""


def channels() -> list[Cell]:
    """Masks of whole channels beside masks of weights, in wider networks; first the trials."""
    setting = "60,000 images, 16 wide"
    base = f"{FASHION['60,000 images']} {_WIDE}"
    rounds = []
    for seed, rate in product((10, 11), CHANNEL_RATES):
        options = f"{CHANNELS['channels']} --sparsity.exploration_rate {rate}"
        name = f"channels, exploring {rate}"
        rounds.append(Cell(setting, name, 0.3, seed, f"{base} {options} --sparsity.generator_density 0.3"))
    for seed in range(3):
        rounds.append(Cell(setting, "dense", 1.0, seed, f"{base} --config dense"))
        for density, (run, options) in product((0.3, 0.1), CHANNELS.items()):
            rounds.append(Cell(setting, run, density, seed, f"{base} {options} --sparsity.generator_density {density}"))
    return rounds


# ---- CIFAR-10 ------------------------------------------------------------------------------------------


def cifar10() -> list[Cell]:
    """The paper's SNGAN; needs a GPU."""
    base = "--config paper --config cifar10_sngan --config benchmarks/cifar10.yaml"
    setting, densities = "CIFAR-10", sorted(DENSITIES)[1:]
    runs = [run for run in EVERYWHERE if "at a fixed density" not in run]  # which no trial has found yet
    rounds = []
    for seed in range(3):
        rounds.append(Cell(setting, "dense", 1.0, seed, f"{base} --config dense"))
        places = product(densities[:1], [run for run in runs if run in CLAIMS])
        rounds += [Cell(setting, run, d, seed, _options(base, setting, run, d)) for d, run in places]
    for seed, density, run in product(range(3), densities, runs):
        rounds.append(Cell(setting, run, density, seed, _options(base, setting, run, density)))
    return _once(rounds)


# ---- the README's -------------------------------------------------------------------------------------


_IN_RUN = (
    "--trainer.logger lightning.pytorch.loggers.TensorBoardLogger --trainer.logger.init_args.save_dir run "
    "--trainer.logger.init_args.name '' --trainer.logger.init_args.version ''"
)
"""Logs and checkpoints in one folder, which the runner replaces by the run's own."""


def digits() -> list[Cell]:
    """Returns the run of `lightning-ddst fit` without arguments, and its dense baseline."""
    runs = (("DDST", 0.1, "ddst"), ("dense", 1.0, "dense"))
    return [Cell("digits", run, density, 0, f"{_IN_RUN} --sparsity.method {method}") for run, density, method in runs]


SAMPLED = (1.0, 0.3, 0.1, 0.05, 0.02)
"""Densities of the generator in the pictures of README and gallery."""


def densities() -> list[Cell]:
    """The README's first command, by density of the generator; the pictures of samples are of seed 0."""
    ddst = "--sparsity.generator_density {}"
    runs = [("dense" if d == 1 else "DDST", d, "--sparsity.method dense" if d == 1 else ddst) for d in SAMPLED]
    runs += [("DDST, paper's bounds", d, f"{ddst} --sparsity.bounds [0.45,0.55]") for d in SAMPLED[-2:]]
    return [
        Cell("digits", run, density, seed, f"{_IN_RUN} {options.format(density)}")
        for seed, (run, density, options) in product(range(2), runs)
    ]


STUDIES: dict[str, Callable[[], list[Cell]]] = {
    "matching": matching,
    "floors": floors,
    "rules": rules,
    "rates": rates,
    "fashion": fashion,
    "unbalanced": unbalanced,
    "ablations": ablations,
    "wide_trials": wide_trials,
    "wide": wide,
    "scaling": scaling,
    "wide_ablations": wide_ablations,
    "controllers": controllers,
    "cifar10_small": cifar10_small,
    "channels": channels,
    "cifar10": cifar10,
    "digits": digits,
    "densities": densities,
}
"""The cells of every study by its name, in the order of their rank."""
