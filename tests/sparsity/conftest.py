import pytest

from lightning_ddst.sparsity import GROWTH_RULES
from lightning_ddst.utils.devices import simulate_launch_bound


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def every_device(request):
    """Runs a test twice: once with the operations that a device bound by launches gets."""
    if request.param == "as on a CPU":
        yield
        return
    with simulate_launch_bound():
        yield


@pytest.fixture
def registered():
    """A place to register rules; they are taken away again."""
    before = dict(GROWTH_RULES)
    yield GROWTH_RULES
    GROWTH_RULES.clear()
    GROWTH_RULES.update(before)
