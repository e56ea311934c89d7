import torch

from lightning_ddst.utils.devices import is_launch_bound, simulate_launch_bound


def test_every_device_but_the_cpu_is_bound_by_launches():
    kinds = {name: is_launch_bound(torch.device(name)) for name in ("cpu", "cuda", "mps")}
    assert kinds == {"cpu": False, "cuda": True, "mps": True}


def test_the_cpu_is_while_it_is_simulated():
    cpu = torch.device("cpu")
    with simulate_launch_bound():
        with simulate_launch_bound():
            assert is_launch_bound(cpu)
        assert is_launch_bound(cpu)
    assert not is_launch_bound(cpu)
