"""Control signals, which measure how strong the discriminator is.

A signal is a function of the balance over a window. To add one, decorate a function:

    @control_signal("score_gap", bounds=(0.5, 1.5), high_means="strong")
    def by_score_gap(balance: Balance) -> float | None:
        return balance.alpha

and pass its name as ``signal``, in Python or in YAML.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_ddst.balance.ratio import Balance
from lightning_ddst.utils.registry import Registry
from lightning_ddst.utils.validation import check_choice

Meaning = Literal["weak", "strong"]
Read = Callable[[Balance], float | None]


@dataclass(frozen=True)
class ControlSignal:
    """A signal with its bounds and its meaning.

    Attributes:
        read: Function from a `Balance` to the signal; None or NaN if it is undecided.
        bounds: Default bounds between which the controller keeps the signal.
        high_means: Meaning of a high signal: the discriminator is too "weak" or too "strong".
        label: Name of the signal in a decision's reason.
    """

    read: Read
    bounds: tuple[float, float]
    high_means: Meaning
    label: str

    @property
    def __wrapped__(self) -> Read:
        """The registered function."""
        return self.read


SIGNALS: Registry[ControlSignal] = Registry("control signal")
"""Every registered control signal by name."""


def control_signal(
    name: str, bounds: tuple[float, float], high_means: Meaning, label: str | None = None
) -> Callable[[Read], Read]:
    """Registers a function as a control signal.

    Args:
        name: Name of the signal in Python, YAML and on the command line.
        bounds: Default bounds between which the controller keeps the signal.
        high_means: Meaning of a high signal: the discriminator is too "weak" or too "strong".
        label: Name of the signal in a decision's reason; by default `name`.

    Returns:
        A decorator for a function from a `Balance` to a number, or to None if the signal is undecided.

    Raises:
        ValueError: If `high_means` is neither "weak" nor "strong".
    """
    check_choice("high_means", high_means, get_args(Meaning))

    def register(read: Read) -> Read:
        SIGNALS.register(name)(ControlSignal(read, bounds, high_means, label or name))
        return read

    return register


@control_signal("balance_ratio", bounds=(0.45, 0.55), high_means="weak", label="BR")
def by_balance_ratio(balance: Balance) -> float | None:
    """Returns the balance ratio (DDST)."""
    return balance.ratio


@control_signal("real_sign", bounds=(0.5, 0.7), high_means="strong", label="E[sign D(x)]")
def by_real_sign(balance: Balance) -> float | None:
    """Returns the mean sign of real images' scores (ADA, Karras et al. 2020); ADA's target is 0.6."""
    return balance.real_sign
