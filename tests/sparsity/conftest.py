import pytest

from lightning_ddst.sparsity import GROWTH_RULES


@pytest.fixture
def registered():
    """A place to register rules; they are taken away again."""
    before = dict(GROWTH_RULES)
    yield GROWTH_RULES
    GROWTH_RULES.clear()
    GROWTH_RULES.update(before)
