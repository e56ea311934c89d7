import pytest
from toys import ToyGAN, trained

from lightning_ddst import DynamicSparsityCallback
from lightning_ddst.attached.summary import Summary, align


def test_cells_are_aligned_and_long_last_cells_wrapped():
    rows = [("one", "a", "b"), ("second", "long cell", "c"), ("x", "words words words words words")]
    assert align(rows) == [
        "one     a          b",
        "second  long cell  c",
        "x       words words words words words",
    ]
    assert align(rows, 30)[2:] == ["x       words words words", "        words words"]


def test_the_table_is_html_in_a_notebook():
    html = Summary("a <b>", [[("", "one", "other"), ("name", "x & y")]])._repr_html_()
    assert "a &lt;b&gt;" in html
    assert html.count("<tr>") == 2
    assert 'colspan="2">x &amp; y</td>' in html


def test_a_run_that_has_not_begun():
    assert str(DynamicSparsityCallback(0.25, method="sdst").summary()) == (
        "Sparse training of a GAN\nmethod    sdst\nnetworks  not masked yet"
    )


def test_attached_networks_are_listed():
    sparsity = DynamicSparsityCallback(0.25, 0.5)
    sparsity.attach(ToyGAN())
    assert str(sparsity.summary()).splitlines() == [
        "Sparse training of a GAN",
        "method          ddst",
        "                generator              discriminator",
        "module          generator              discriminator",
        "class           Sequential             Sequential",
        "weight tensors  2 of 2 maskable        2 of 2 maskable",
        "weights         768 maskable (100.0%)  544 maskable (100.0%)",
        "density         25.0%                  50.0% at the start",
    ]


def plan_of(**arguments) -> tuple[list[str], list[tuple[str, str]]]:
    sparsity = DynamicSparsityCallback(0.25, **arguments)
    trained(sparsity, epochs=4)  # 40 generator updates
    start, results = sparsity.summary().blocks
    place = [row[0] for row in start].index("plan")
    return [row[1] for row in start[place:]], results


def test_the_plan_and_the_results_of_a_run():
    plan, results = plan_of(interval=8, explore_interval=5, probe_interval=2, bounds=(0.0, 1e-9))
    assert plan == [
        "40 generator updates expected",
        "balance ratio (BR) measured every 2 updates, 20 times",
        "decision on the discriminator every 8 updates, 5 times",
        "exploration of the generator every 5 updates, 8 times",
    ]
    assert [name for name, _ in results] == [
        *("so far", "generator", "discriminator"),
        *("balance ratio, last window", "discriminator resized", "training FLOPs"),
    ]
    assert dict(results)["so far"] == "40 generator updates"
    assert "in 5 decisions" in dict(results)["discriminator resized"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"method": "static", "probe_interval": None}, []),
        ({"method": "sdst", "probe_interval": None, "explore_interval": 1}, ["generator at every update, 40 times"]),
        ({"method": "posthoc", "probe_interval": None}, ["pruning by magnitude at update 27"]),
        (
            {"method": "imp", "probe_interval": None},  # 0.8**7 is the first power below 0.25
            ["7 rounds of pruning by magnitude, at updates 5 to 35"],
        ),
    ],
)
def test_the_plans_of_other_methods(arguments, expected):
    plan, _ = plan_of(**arguments)
    assert plan[0] == "40 generator updates expected"
    assert [line.removeprefix("exploration of the ") for line in plan[1:]] == expected


def test_densities_that_change_by_plan_are_ranges():
    sparsity = DynamicSparsityCallback(0.25, method="posthoc", discriminator_density=0.5)
    sparsity.attach(ToyGAN())
    assert sparsity.summary().blocks[0][-1] == ("density", "100.0% to 25.0%", "100.0% to 50.0%")
