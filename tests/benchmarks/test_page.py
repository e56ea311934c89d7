"""The results page against the result files it is made from."""

import re
from statistics import fmean

import page
import pytest
from comparisons import (
    Comparison,
    distance,
    failed,
    flops,
    geometric_mean,
    mean_density,
    of,
    of_run,
    repeated_densities,
)
from rows import path, rows
from studies import CIFAR_SMALL, ESTIMATED, UNBALANCED, WIDE_RUNS


def row(seed, value, **more):
    return {"setting": "s", "run": "r", "density": 0.1, "seed": seed, "distance": [[1, 99.0], [2, value]], **more}


def test_the_tables_are_those_that_the_result_files_give():
    made = page.pages()
    assert page.DOCS / "results.md" in made
    assert [each for each, text in made.items() if each.read_text() != text] == []


def test_every_page_of_results_is_made():
    assert {each for each in page.pages() if each.parent.name == "results"} == set((page.DOCS / "results").iterdir())


def test_every_table_is_on_a_page():
    templates = [*(page.HERE / "pages").iterdir(), *(page.DOCS / name for name in page.WITH_TABLES)]
    shown = re.findall(r"{{(.+?)}}|<!-- rows: (.+?) -->", "".join(each.read_text() for each in templates))
    assert {name for names in shown for name in names if name} == set(page.TABLES)


def test_every_picture_of_the_pages_is_there():
    for made, text in page.pages().items():
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
            assert (made.parent / picture).is_file(), picture


def test_the_first_runs_numbers_are_those_of_the_rows():
    by_run = {each["run"]: each for each in rows("digits")}
    ddst, dense = by_run["DDST"], by_run["dense"]
    start = (page.DOCS / "start.md").read_text()
    said = dict(re.findall(r"^ *(\S.*?)  +(\S.*)$", start, re.MULTILINE))
    (_, before), *_, (updates, after) = ddst["distance"]
    assert updates == 2500
    assert said["after 0 generator updates"] == f"{before:.4g}"
    assert said["after 2,500 generator updates"] == f"{after:.4g}"
    assert said["dense baseline, same seed and length"] == f"{dense['distance'][-1][1]:.4g}"
    assert (
        said["training FLOPs"]
        == f"{ddst['flops'][-1][1]:.1%} of dense training (dense kernels do the arithmetic all the same)"
    )
    assert said["balance ratio, last window"] == f"{ddst['balance_ratio'][-1][1]:.3f}"
    assert said["discriminator"].startswith(f"density {ddst['discriminator_density'][-1][1]:.4f} ")


def mean_and_seeds(cell):
    return f"{fmean(map(distance, cell)):.1f}", str(len(cell))


def test_what_the_readme_claims_is_in_the_rows():
    found, setting = rows("wide"), "60,000 images"
    readme = " ".join((page.DOCS.parent / "README.md").read_text().split())
    said = re.search(
        r"Trained with (\d+) % of the operations of dense training, .* mean Frechet distance of (\S+) on Fashion-MNIST "
        r"\((\d) seeds\), the dense generator (\S+) \((\d) seeds?\)",
        readme,
    )
    sparse, dense = of(found, setting, "DDST auto", 0.1), of(found, setting, "dense", 1.0)
    assert said.groups() == (
        f"{100 * fmean(map(flops, sparse)):.0f}",
        *mean_and_seeds(sparse),
        *mean_and_seeds(dense),
    )
    narrow = rows("cifar10_small")
    on_cifar10 = re.search(
        r"On CIFAR-10, .* it is (\S+) \((\d) seeds\), the dense generator's (\S+) \((\d) seeds\)", readme
    )
    sparse, dense = (of(narrow, CIFAR_SMALL, *cell) for cell in (("DDST auto", 0.1), ("dense", 1.0)))
    assert on_cifar10.groups() == (*mean_and_seeds(sparse), *mean_and_seeds(dense))
    for density in (0.05, 0.1):
        means = {run: geometric_mean(map(distance, of(found, setting, run, density))) for run in WIDE_RUNS}
        growing = [means[run] for run in ("DDST auto", "DDST relaxed", "ramp", "ramp to 0.5")]
        assert max(growing) < min(mean for run, mean in means.items() if run.startswith("RigL"))
        assert max(means, key=means.__getitem__) == "RigL, balanced D"
    said = re.search(
        r"default has (\S+) times the distance of the best .*? \((\d) seeds; .*? interval (\S+) to (\S+)\)", readme
    )
    best, *ramps = page.opponents(found, setting, "DDST auto", 0.05, 0.1).values()
    assert said.groups() == (f"{best.ratio:.2f}", str(best.pairs // 2), *(f"{end:.2f}" for end in best.interval))
    assert best.verdict == "better"
    few = page.opponents(found, "300 images", "DDST auto", 0.1)["ramp"]
    assert few.verdict == "worse"
    assert f"{few.ratio:.2f} times its distance, {few.pairs} seeds" in readme
    twenty = page.opponents(found, setting, "DDST auto", 0.2)["ramp to 0.5"]
    assert twenty.verdict == "better"
    assert f"better than the ramp to 0.5 ({twenty.ratio:.2f} times)" in readme
    alike = page.opponents(narrow, CIFAR_SMALL, "DDST auto", 0.1, 0.3).values()
    assert {each.verdict for each in (*ramps, *alike)} == {"within a factor of 1.5"}


def test_the_default_failed_where_the_readme_says():
    fast, slow = UNBALANCED
    unbalanced = rows("unbalanced")
    studies = ("wide", "scaling", "fashion", "cifar10_small")
    default = [each for study in studies for each in of_run(rows(study), "DDST auto")]
    default = [row for row in default if row["setting"] != "width 6"]  # "fashion" has these runs, too
    readme, *pages = (
        " ".join((page.DOCS / name).read_text().split()) for name in ("../README.md", "results.md", "bounds.md")
    )
    for text in (readme, *pages):
        assert int(re.search(r"failed in none of (\d+) runs", text)[1]) == len(default)
    assert not any(map(failed, default))
    ours = of(unbalanced, fast, "DDST auto", 0.1)
    assert not any(map(failed, ours))
    said = re.search(r"worse than the ramp to 0.5 \((\S+) times its distance\)", readme)[1]
    comparison = Comparison(ours, of(unbalanced, fast, "ramp to 0.5", 0.1))
    assert (f"{comparison.ratio:.1f}", comparison.verdict) == (said, "worse")
    for run in ("DDST auto", "ramp to 0.5"):
        assert [failed(row) for row in of(unbalanced, slow, run, 0.1)] == [True] * 3
    assert sum(failed(row) for row in of(unbalanced, slow, "ramp", 0.1)) == 1
    papers = of_run(rows("fashion"), "DDST relaxed")
    assert {failed(row) for row in papers if row["density"] == 0.05} == {True}
    assert not any(failed(row) for row in papers if row["density"] > 0.05)


@pytest.mark.parametrize("study", ["fashion", "wide", "cifar10_small", "scaling", "mask_update", "digits", "densities"])
def test_rows_name_their_source(study):
    assert rows(study)
    for each in rows(study):
        assert {"command", "versions", "commit", "machine"} <= each.keys()
        assert "dirty" not in each["commit"]


@pytest.mark.parametrize("study", ["fashion", "wide", "cifar10_small", "ablations", "cifar10", "digits", "densities"])
def test_no_run_has_two_rows(study):
    keys = [(each["setting"], each["run"], each["density"], each["seed"]) for each in rows(study)]
    assert len(set(keys)) == len(keys)


def test_densities_with_one_seed_are_not_shown():
    found = [row(0, 1.0), row(1, 1.0), row(0, 1.0) | {"density": 0.3}, row(0, 1.0) | {"density": 0.3, "run": "other"}]
    found += [row(0, 1.0) | {"density": 1.0}, row(1, 1.0) | {"density": 1.0}, row(0, 1.0) | {"setting": "t"}]
    assert repeated_densities(found, "s") == [0.1]
    assert repeated_densities(found, "t") == []


def test_a_comparison_is_paired_by_seed():
    ones = [row(0, 2.0), row(1, 8.0), row(2, 1.0), row(3, 5.0)]
    others = [row(2, 1.0), row(1, 2.0), row(0, 4.0), row(7, 9.0)]
    found = Comparison(ones, others)  # ratios 1/2, 4 and 1
    assert found.pairs == 3
    assert found.ratio == pytest.approx(2 ** (1 / 3))
    low, high = found.interval
    # The logarithms to base 2 are -1, 2 and 0: mean 1/3, standard deviation 1.5275; Student's t is 4.3027.
    assert (low, high) == pytest.approx(
        (2 ** (1 / 3 - 4.3027 * 1.5275 / 3**0.5), 2 ** (1 / 3 + 4.3027 * 1.5275 / 3**0.5)), rel=1e-3
    )
    assert found.verdict == "not told apart"
    assert found.cells == 1


def test_of_several_cells_each_counts_as_much():
    ones = [row(0, 2.0), row(1, 4.0), row(0, 1.0) | {"density": 0.3}, row(0, 2.0) | {"setting": "other"}]
    others = [row(0, 1.0), row(1, 1.0), row(0, 1.0) | {"density": 0.3}, row(0, 1.0) | {"setting": "other"}]
    found = Comparison(ones, others)  # logarithms to base 2 of cells: 1.5, 0 and 1
    assert (found.pairs, found.cells) == (4, 3)
    assert found.ratio == pytest.approx(2 ** (2.5 / 3))
    half = 4.3027 * 0.7638 / 3**0.5  # of their standard deviation
    assert found.interval == pytest.approx((2 ** (2.5 / 3 - half), 2 ** (2.5 / 3 + half)), rel=1e-3)


def test_several_cells_can_be_averaged_by_seed():
    densities = {0.1: (2.0, 0.5, 1.0, 9.0), 0.3: (1.0, 4.0, 0.5)}  # the fourth seed lacks a cell
    ones = [row(seed, value) | {"density": d} for d, values in densities.items() for seed, value in enumerate(values)]
    others = [row(seed, 1.0) | {"density": density} for density in densities for seed in range(4)]
    found = Comparison(ones, others, by_seed=True)  # logarithms to base 2: 1 and 0, -1 and 2, 0 and -1
    assert (found.pairs, found.cells) == (6, 2)
    assert found.ratio == pytest.approx(2 ** (1 / 6))
    half = 4.3027 * 0.57735 / 3**0.5  # of the means 1/2, 1/2 and -1/2
    assert found.interval == pytest.approx((2 ** (1 / 6 - half), 2 ** (1 / 6 + half)), rel=1e-3)
    assert found.verdict == "not told apart"
    assert Comparison(ones[:1], others, by_seed=True).verdict == "too few seeds"


def test_nearly_equal_means_within_a_factor():
    ones, others = [row(i, 2.0 + i / 10) for i in range(3)], [row(i, 2.1) for i in range(3)]
    assert Comparison(ones, others).verdict == "within a factor of 1.5"


def test_a_difference_beyond_the_noise_has_a_direction():
    ones, others = [row(i, 1.0 + i / 100) for i in range(3)], [row(i, 2.0) for i in range(3)]
    assert Comparison(ones, others).verdict == "better"
    assert Comparison(others, ones).verdict == "worse"
    assert Comparison(ones[:2], others).verdict == "too few seeds"
    assert str(Comparison(ones, [])) == "missing"


def test_measuring_counts_where_something_depends_on_it():
    logged = {"flops": [[1, 0.5], [2, 0.4]], "measuring": [[2, 0.1]]}
    assert flops(row(0, 1.0, **logged) | {"run": "DDST relaxed"}) == 0.4
    assert flops(row(0, 1.0, **logged) | {"run": "RigL, D explores at a fixed density"}) == pytest.approx(0.3)
    assert flops(row(0, 1.0, **logged) | {"run": "BR every 10th update"}) == 0.4
    assert mean_density(row(0, 1.0, discriminator_density=[[1, 0.1], [2, 0.3]])) == pytest.approx(0.2)


def test_a_cell_is_in_the_order_of_seeds():
    found = [row(1, 2.0), row(0, 3.0), row(0, 4.0) | {"density": 0.3}]
    assert of(found, "s", "r", 0.1) == [found[1], found[0]]


def test_result_files_are_next_to_the_benchmarks():
    assert path("fashion").is_file()


@pytest.mark.parametrize("run", ESTIMATED)
def test_both_estimators_are_of_one_run(run):
    one = of(rows("fashion"), "60,000 images", run, 0.1)[0]
    other = of(rows("ablations"), "60,000 images", f"{run}, mean of ratios", 0.1)[0]
    assert one["distance"] == other["distance"]
    assert one["alpha"] == other["alpha"]
