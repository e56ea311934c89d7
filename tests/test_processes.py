"""Compares training in two processes (tests/two_processes.py) with training in one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes

from lightning_ddst import GeneratorEMA

HERE = Path(__file__).parent
NEEDS_FSDP2 = pytest.mark.skipif(not two_processes.FSDP2, reason="FSDP2 works on CPUs from torch 2.7 on")


def run(folder, *cases):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{HERE}:{HERE.parent}",
        "PYTHONFAULTHANDLER": "1",
    }
    done = subprocess.run(
        [*command, str(HERE / "two_processes.py"), str(folder), *cases],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def failure(printed):
    """Returns what was printed from the first sign of a failure on: the process that fails second prints more."""
    found = re.search(r"Traceback|terminate called|Fatal Python error", printed)
    return printed[max(found.start() - 500, 0) :][:6000] if found else printed[-4000:]


def results_of(folder, *cases):
    code, printed = run(folder, *cases)

    def result(case):
        files = [folder / case.replace(" ", "_") / f"{rank}.pt" for rank in (0, 1)]
        assert all(file.exists() for file in files), failure(printed)
        return [torch.load(file, weights_only=False) for file in files]

    result.code, result.printed = code, printed
    return result


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def long_results(tmp_path_factory):
    return results_of(tmp_path_factory.mktemp("long"), *two_processes.LONG_CASES)


def assert_alike(first, second):
    assert str(first["seen"]) == str(second["seen"])  # NaN, where nothing was measured yet, is not itself
    for name, value in first["weights"].items():
        if "running_" not in name:  # statistics of each process's own batches
            assert torch.equal(value, second["weights"][name]), name
    for *_, active, clean in first["seen"]:
        assert all(active)
        assert clean


@pytest.mark.parametrize("case", [case for case in two_processes.CASES if case.startswith("methods")])
def test_masks_decisions_and_weights_are_the_same_at_every_update(results, case):
    first, second = results(case)
    assert_alike(first, second)
    updates, checksums, decisions, balances, *_ = zip(*first["seen"], strict=True)
    assert updates[-1] == 20
    changes = len(set(checksums))
    method = case.split()[1]
    if method in ("static", "posthoc"):
        assert changes == {"static": 1, "posthoc": 2}[method]
    else:
        assert changes >= 5
    assert bool(decisions[-1]) == (method not in ("static", "sdst"))
    assert all(balance.samples for balance in balances)


@pytest.mark.parametrize(
    ("case", "arguments"),
    [
        ("gradient", ("gradient",)),
        ("momentum", ("momentum",)),
        ("weight norm", ("momentum", two_processes.NormedGAN)),
    ],
)
def test_one_process_and_two_make_the_same_mask_changes(results, case, arguments):
    changes = two_processes.exact(1, *arguments)
    assert len(changes) >= 4  # as drawn, and three changes
    for masks in results(f"exact {case}"):
        for own, other in zip(changes[:4], masks[:4], strict=True):
            assert all(torch.equal(mask, other[name]) for name, mask in own.items())


def test_a_gan_module_trains_under_plain_ddp_with_noise_of_its_own_in_every_process(results):
    first, second = results("GANModule ddp")
    assert_alike(first, second)
    assert first["noise"].shape == (8, 4)
    assert not torch.equal(first["noise"], second["noise"])


def test_gradients_of_several_backward_passes_are_reduced_and_add_up(results):
    first, second = results("accumulated")
    assert_alike(first, second)
    assert len({checksums for _, checksums, *_ in first["seen"]}) >= 3


def test_a_loop_with_fabric_trains_under_ddp(results):
    first, second = results("fabric")
    assert_alike(first, second)
    assert first["seen"][-1][0] == 10  # updates: each process has half the batches
    assert len({checksums for _, checksums, *_ in first["seen"]}) >= 3


def test_a_mask_that_differs_stops_the_run(results):
    for message in results("tampering"):
        assert message.startswith(
            "RuntimeError: the masks and decisions at generator update 5 must be the same in every"
        )


def test_plain_ddp_is_rejected_naming_the_strategy_that_works(results):
    for message in results("plain ddp"):
        assert message.startswith("ValueError: DistributedDataParallel, as set up here, expects")
        assert 'Trainer(strategy="ddp_find_unused_parameters_true")' in message


@NEEDS_FSDP2
@pytest.mark.parametrize("growth", ["gradient", "momentum"])
def test_parameters_that_are_split_over_processes_get_the_same_masks(results, growth):
    first, second = results(f"sharded {growth}")
    assert_alike(first, second)
    average = GeneratorEMA(0.9)
    changes = two_processes.exact(1, growth, callbacks=[average])
    assert len(changes) >= 4
    for own, masks in zip(changes[:4], first["masks"][:4], strict=True):
        assert all(torch.equal(mask, masks[name]) for name, mask in own.items())
    torch.testing.assert_close(first["average"], average.averages())


@NEEDS_FSDP2
def test_weight_norm_that_is_split_over_processes_is_rejected(results):
    for message in results("sharded weight norm"):
        assert message.startswith("ValueError: generator with generator_density=0.3: Layer '0' has weight norm")


@NEEDS_FSDP2
def test_layers_that_are_split_over_processes_are_rejected(results):
    for message in results("tensor parallel"):
        assert message.startswith("ValueError: tensor_parallel_size=2 splits single layers' arithmetic")


@pytest.mark.parametrize("case", [case for case in two_processes.CASES if case.startswith("crash")])
def test_a_killed_run_of_two_processes_resumes_as_if_uninterrupted(results, case):
    assert results(case) == [True, True]


def test_the_distance_is_that_of_all_processes_images(results):
    (first, second) = results("distance")
    assert first == second
    assert len(first) == 2  # at the end of the epoch, and in the validation


def test_every_case_ended_well(results):
    assert results.code == 0, failure(results.printed)


@pytest.mark.long
@pytest.mark.parametrize("case", two_processes.LONG_CASES)
def test_the_whole_matrix_of_crashes_of_two_processes(long_results, case):
    assert long_results(case) == [True, True]
