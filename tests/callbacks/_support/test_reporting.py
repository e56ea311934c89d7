import re
from inspect import signature
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata
from toys import ToyGAN, toy_trainer, trained

from lightning_ddst import DynamicSparsityCallback
from lightning_ddst.attached.options import RunOptions
from lightning_ddst.balance import Decision
from lightning_ddst.callbacks._support.reporting import hparams, layout, summary_markdown
from lightning_ddst.methods import DDA, DDST, Dense, Method, Ramp, Static
from lightning_ddst.sparsity import GROWTH_RULES, LayerFlops


class WithHyperparameters(ToyGAN):
    """Lightning logs these itself, after the callback."""

    def __init__(self, width: int = 32, loss: str = "hinge") -> None:
        super().__init__()
        self.save_hyperparameters()


def events_of(folder, *callbacks, module=None) -> EventAccumulator:
    logger = TensorBoardLogger(folder)
    trained(*callbacks, folder=folder, logger=logger, log_every_n_steps=5, gan=module and module())
    return EventAccumulator(logger.log_dir, {"tensors": 0, "scalars": 0}).Reload()


def texts(events: EventAccumulator, tag: str) -> list[tuple[int, str]]:
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(f"{tag}/text_summary")]


# ---- words ---------------------------------------------------------------------------------------------


def network(density: float, coverage: float) -> SimpleNamespace:
    return SimpleNamespace(density=density, coverage=coverage, units=SimpleNamespace(dense_kernels=True))


def training(method: Method, *decisions: tuple[int, str, float, str]) -> SimpleNamespace:
    networks = {"generator": network(0.1, 0.25), "discriminator": network(0.2, 0.3)}
    return SimpleNamespace(
        updates=1200,
        network=networks.get,
        mask_updates=method.mask_updates(),
        decisions=[(update, Decision(action, density, reason)) for update, action, density, reason in decisions],
        flops=SimpleNamespace(total=LayerFlops(steps=30, dense_gradients=5, probes=5, dense=100)),
    )


def test_the_summary_lists_decisions_with_their_reasons() -> None:
    method = DDST(generator_density=0.1, bounds=(0.45, 0.55))
    run = training(
        method,
        (300, "hold", 0.1, "BR 0.500 is within 0.45 to 0.55"),
        (600, "grow", 0.15, "BR 0.600 > 0.55: the discriminator is too weak"),
        (900, "grow", 0.2, "BR 0.700 > 0.55: the discriminator is too weak"),
        (1200, "hold", 0.2, "BR 0.510 is within 0.45 to 0.55"),
    )
    words = summary_markdown(method, run).splitlines()
    assert words[:5] == [
        "### After 1,200 generator updates, method ddst",
        "- The **generator** has 10.0% of its weights, and tries others: 25.0% were active at some time.",
        "- The **discriminator** has 20.0% of its weights, after 10.0% at the start: grown twice because it was "
        "too weak, left as it was twice.",
        "- The last decision, at update 1,200: **hold**, since BR 0.510 is within 0.45 to 0.55.",
        "- Training took 40.0% of the operations of dense training, 5.0% for measuring BR. Dense kernels do all of "
        "them the same.",
    ]
    assert words[5] == (
        "- BR, the balance ratio, is the share of the gap between the scores of real and of generated images that one "
        "generator update closes. Where BR is above its bounds, the discriminator is too weak and gets weights; below, "
        "it is too strong and loses weights."
    )
    assert words[6:] == [
        "",
        "| generator updates | decided | density then | why (the last time) |",
        "|---|---|---|---|",
        "| 1,200 | hold | 0.2 | BR 0.510 is within 0.45 to 0.55 |",
        "| 600 to 900 | grow, twice | 0.2 | BR 0.700 > 0.55: the discriminator is too weak |",
        "| 300 | hold | 0.1 | BR 0.500 is within 0.45 to 0.55 |",
    ]


def test_a_long_summary_drops_its_oldest_rows() -> None:
    method = DDST(generator_density=0.1)
    run = training(method, *[(update, ("hold", "grow")[update % 2], 0.1, "because") for update in range(1, 101)])
    words = summary_markdown(method, run)
    assert words.count("because |") == 40
    assert "| 100 | hold |" in words
    assert "| 60 |" not in words
    assert words.endswith("60 earlier rows are left out.")


def test_the_summary_explains_automatic_bounds() -> None:
    method = DDST(generator_density=0.1)
    run = training(method, (600, "grow", 0.15, "BR 0.600 is 97% of its highest level so far, 0.620"))
    words = summary_markdown(method, run)
    assert "after 10.0% at the start: grown once.\n" in words
    assert "The nearer BR is to the highest level that it has reached, the more weights the discriminator gets" in words
    assert "too weak" not in words


@pytest.mark.parametrize(("method", "start"), [(Dense(), "100.0%"), (Static(generator_density=0.2), "20.0%")])
def test_where_nothing_is_decided_there_is_no_table(method: Method, start: str) -> None:
    words = summary_markdown(method, training(method))
    assert f"- The **discriminator** has 20.0% of its weights, after {start} at the start.\n" in words
    assert "|" not in words
    assert "BR, the balance ratio" not in words


def test_the_summary_explains_another_signal() -> None:
    method = DDA(generator_density=0.1, signal="real_sign")
    words = summary_markdown(method, training(method, (600, "hold", 0.1, "because")))
    assert (
        "\n- Where E[sign D(x)] is above its bounds, the discriminator is too strong and loses weights; below, it is "
        "too weak and gets weights.\n"
    ) in words
    assert "BR, the balance ratio" not in words


def test_a_ramp_does_not_claim_to_judge() -> None:
    method = Ramp(generator_density=0.1)
    run = training(method, (600, "grow", 0.5, "50% of the run is done"))
    assert "grown once.\n" in summary_markdown(method, run)


# ---- a run's page --------------------------------------------------------------------------------------


def test_a_run_writes_its_summary_at_every_epochs_end(tmp_path) -> None:
    sparsity = DynamicSparsityCallback(0.2, interval=5, explore_interval=5, probe_interval=1)
    (step, words), *others = texts(events_of(tmp_path, sparsity), "about/what_happened")
    assert (step, others) == (10, [])
    assert words.startswith("### After 10 generator updates, method ddst\n")
    assert f"**{sparsity.decisions[-1][1].action}**, since {sparsity.decisions[-1][1].reason}." in words


@pytest.mark.parametrize("method", ["ddst", "sdst", "ramp"])
def test_every_chart_of_the_layout_has_what_it_shows(method: str, tmp_path) -> None:
    sparsity = DynamicSparsityCallback(0.2, method=method, interval=2, explore_interval=5, probe_interval=1)
    events = events_of(tmp_path, sparsity)
    (event,) = events.Tensors("custom_scalars__config__")
    page = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in page.category] == [
        "1. Are the networks in balance?",
        "2. What follows from it",
        "4. Costs and losses",
    ]
    logged = events.Tags()["scalars"]
    (first,) = page.category[0].chart
    assert first.title == ("control signal within its bounds" if method == "ddst" else "balance ratio")
    for category in page.category:
        for chart in category.chart:
            for series in chart.margin.series:
                assert {series.value, series.lower, series.upper} <= set(logged)
            for tag in chart.multiline.tag:
                assert chart.title == "losses" or any(re.match(tag, name) for name in logged), tag


def test_pairs_have_charts_of_their_own() -> None:
    page = layout({"first/": False, "second.g/": True}, ["frechet_distance/cnn"])
    assert list(page) == [
        "1. Are the networks in balance, first?",
        "2. What follows from it, first",
        "1. Are the networks in balance, second.g?",
        "2. What follows from it, second.g",
        "3. Samples",
        "4. Costs and losses",
    ]
    assert list(page["1. Are the networks in balance, first?"]) == ["balance ratio"]
    (_, series) = page["1. Are the networks in balance, second.g?"]["control signal within its bounds"]
    assert series == ["second.g/control/signal", "second.g/control/lower", "second.g/control/upper"]
    assert page["3. Samples"] == {"frechet_distance/cnn": ["Multiline", ["^frechet_distance/cnn$"]]}


@pytest.mark.parametrize("module", [ToyGAN, WithHyperparameters])
def test_hyperparameters_are_shown_with_the_final_numbers(module, tmp_path) -> None:
    sparsity = DynamicSparsityCallback(0.2, interval=5, explore_interval=5, probe_interval=1)
    events = events_of(tmp_path, sparsity, module=module)
    of_plugin = events.PluginTagToContent("hparams")
    experiment = metadata.parse_experiment_plugin_data(of_plugin[metadata.EXPERIMENT_TAG])
    assert [info.name.tag for info in experiment.metric_infos] == [
        "balance/ratio",
        "density/generator",
        "density/discriminator",
        "flops/training_ratio",
        "generator_updates",
    ]
    # They are curves of the run; TensorBoard shows each one's last value.
    assert {info.name.tag for info in experiment.metric_infos} <= set(events.Tags()["scalars"])
    settings = metadata.parse_session_start_info_plugin_data(of_plugin[metadata.SESSION_START_INFO_TAG]).hparams
    assert settings["generator_density"].number_value == 0.2
    assert settings["method"].string_value == "ddst"
    assert (settings["granularity"].string_value, settings["growth"].string_value) == ("weight", "gradient")
    assert settings["discriminator_density"].string_value == "0.2"
    assert settings["sparsity.bounds"].string_value == "auto"
    assert settings["sparsity.delta"].string_value == ""
    assert settings["sparsity.max_discriminator_density"].number_value == 1
    assert (settings["seed"].number_value, settings["run_length"].string_value) == (0, "1 epoch")
    assert settings["other_settings"].string_value == "interval=5, explore_interval=5, probe_interval=1"
    if module is WithHyperparameters:
        assert (settings["width"].number_value, settings["loss"].string_value) == (32, "hinge")


@pytest.mark.parametrize(
    ("arguments", "limits", "expected"),
    [
        (
            {"method": "dense"},
            {},
            {"generator_density": 1.0, "discriminator_density": "1.0", "max_discriminator_density": 1.0, "bounds": ""},
        ),
        (
            {"bounds": "auto", "max_discriminator_density": 0.5, "granularity": "channel", "dense_layers": ["*.3"]},
            {"max_epochs": -1, "max_steps": 2000},
            {
                "bounds": "auto",
                "delta": "",
                "max_discriminator_density": 0.5,
                "granularity": "channel",
                "run_length": "2,000 steps",
                "other_settings": "dense_layers=*.3",
            },
        ),
        (
            {"method": "ramp", "delta": None, "seed": 7},
            {"max_time": {"hours": 1}, "max_epochs": 3},
            {"bounds": "", "delta": "", "seed": 7, "run_length": "3 epochs, 3,600 s", "other_settings": ""},
        ),
        ({"signal": "real_sign", "bounds": (0.5, 0.75)}, {}, {"bounds": "0.5 to 0.75"}),
    ],
)
def test_columns_show_what_the_run_does(arguments: dict, limits: dict, expected: dict) -> None:
    sparsity = DynamicSparsityCallback(**{"generator_density": 0.1} | arguments)
    options = RunOptions.of_arguments(
        {name: each.default for name, each in signature(DynamicSparsityCallback).parameters.items()}
        | {"generator_density": 0.1}
        | arguments
    )
    trainer = toy_trainer(**({"max_epochs": 5} | limits))
    columns = hparams(trainer, options, GROWTH_RULES["random"], sparsity.changed_settings)
    shown = {name.removeprefix("sparsity."): value for name, value in columns.items()}
    assert {name: shown[name] for name in expected} == expected
    first = ["discriminator_density", "generator_density", "granularity", "growth", "method"]
    assert sorted(columns)[:5] == first  # which TensorBoard shows at first
