"""Options of a run, as they are saved and compared."""

from lightning_ddst import DynamicSparsityCallback
from lightning_ddst.balance import Balance, Controller, Decision
from lightning_ddst.methods import DDST


class Steady(Controller):
    def decide(self, balance: Balance, density: float, progress: float = 0.0, share: float = 0.0) -> Decision:
        return Decision("hold", density, "steady")


def test_equal_settings_with_objects_of_ones_own_are_equal() -> None:
    first, second = (DynamicSparsityCallback(method=DDST(generator_density=0.1, controller=Steady())) for _ in "ab")
    assert first.changed_settings == second.changed_settings
    assert "Steady" in first.changed_settings["controller"]
