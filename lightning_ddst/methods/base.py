"""The two interfaces of a method: its settings (`Method`), and its changes of masks (`MaskUpdate`)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args

from lightning_ddst.methods.intervals import Plan
from lightning_ddst.utils.registry import Registry
from lightning_ddst.utils.validation import check_density, to_plain_numbers

if TYPE_CHECKING:
    from lightning_ddst.methods.training import SparseTraining

Role = Literal["generator", "discriminator"]
ROLES: tuple[Role, ...] = get_args(Role)

M = TypeVar("M", bound="type[Method]")


class MaskUpdate(ABC):
    """Base class of a rule that changes masks; `SparseTraining` calls it after every generator update.

    Attributes:
        roles: The networks whose masks it changes.
        grows: Whether it may need dense gradients, to grow weights by.
        decides: Whether it reads the window of measurements, so that the balance ratio must be measured.
        resizes: Whether it changes densities; if so, it appends its decisions to ``training.decisions``.
        pending: Whether it is due, or was postponed.
    """

    roles: tuple[Role, ...] = ROLES
    grows: ClassVar[bool] = True
    decides: ClassVar[bool] = False
    resizes: ClassVar[bool] = True
    pending: bool = False

    @abstractmethod
    def due(self, update: int, plan: Plan) -> bool:
        """Returns whether masks should change at a generator update.

        `SparseTraining` also calls it for the next update, so that dense gradients are recorded in time.

        Args:
            update: Generator updates so far, from 1.
            plan: The current intervals.
        """

    @abstractmethod
    def apply(self, training: "SparseTraining") -> bool:
        """Changes masks.

        Args:
            training: The networks, the window of measurements, the dense gradients and the progress.

        Returns:
            False to be called again after the next update, because a dense gradient is missing.
        """

    def begin(self, training: "SparseTraining") -> None:  # noqa: B027 -- most have nothing to prepare
        """Prepares for a run, after the first masks were made."""

    def describe_plan(self, plan: Plan) -> str:
        """Returns a line about the times of its changes in a run; empty if there is nothing to describe."""
        return ""

    def readings(self, training: "SparseTraining") -> dict[str, float]:
        """Returns the numbers that its decisions depend on, by their logged names."""
        return {}

    def explanation(self) -> str:
        """Returns one or two sentences for TensorBoard that explain its decisions; empty if there are none."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that is needed to resume exactly; loads with ``weights_only=True``."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 -- most have nothing to remember
        """Restores the state returned by `state_dict`; it may be called before `begin`, to check a state."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A method of sparse training, described as in the experiment section of a paper.

    Subclasses are frozen dataclasses. Their fields can be set in Python, in YAML and on the command line.
    `mask_updates` returns the rules that change masks.

    Args:
        generator_density: The generator's density: active over maskable weights, in (0, 1].
        discriminator_density: The discriminator's density; by default the generator's.

    Attributes:
        needs_run_length: Whether it needs a run of known length.
        needs_balance: Whether it needs measurements of the balance ratio.
        starts_dense: Whether both networks start dense.

    Raises:
        ValueError: For a density outside (0, 1].
    """

    generator_density: float
    discriminator_density: float | None = None

    needs_run_length: ClassVar[bool] = False
    needs_balance: ClassVar[bool] = False
    starts_dense: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Checks the densities."""
        to_plain_numbers(self)
        check_density("generator_density", self.generator_density)
        if self.discriminator_density is not None:
            check_density("discriminator_density", self.discriminator_density)

    @property
    def name(self) -> str:
        """The registered name of the method, or else the name of its class."""
        return next((name for name, method in METHODS.items() if method is type(self)), type(self).__name__)

    @property
    def final_densities(self) -> dict[Role, float]:
        """The densities that the networks keep, or reach by the end of the method's plan."""
        discriminator = self.discriminator_density
        return {
            "generator": self.generator_density,
            "discriminator": self.generator_density if discriminator is None else discriminator,
        }

    @property
    def initial_densities(self) -> dict[Role, float]:
        """The densities at which training starts."""
        return dict.fromkeys(ROLES, 1.0) if self.starts_dense else self.final_densities

    @property
    def lowest_densities(self) -> dict[Role, float]:
        """The lowest densities that the method may reach; they are checked before training."""
        initial, final = self.initial_densities, self.final_densities
        return {role: min(initial[role], final[role]) for role in ROLES}

    @abstractmethod
    def mask_updates(self) -> Sequence[MaskUpdate]:
        """Returns the rules that change masks, in the order of their application; new objects for every run."""

    @classmethod
    def arguments(cls) -> list[str]:
        """Returns the names of the method's arguments."""
        return [field.name for field in fields(cls)]

    def argument_of(self, role: Role, density: float) -> str:
        """Returns the name of the argument that set a network's density, for errors."""
        given = [name for name in self.arguments() if name.endswith(f"{role}_density")]
        return next((name for name in given if getattr(self, name) == density), f"{role}_density")


METHODS: Registry[type[Method]] = Registry("method")
"""Every registered method by name."""


def training_method(name: str) -> Callable[[M], M]:
    """Registers a `Method` under a name, for ``method=`` in Python, YAML and on the command line.

    Args:
        name: The name.

    Returns:
        A decorator for a frozen dataclass that is a `Method`.
    """
    return METHODS.register(name)  # type: ignore[return-value]


def make_method(method: Method | str, flat: Mapping[str, Any]) -> Method:
    """Makes a method from its name and flat arguments.

    Args:
        method: A registered name, or a method object.
        flat: Arguments by name; None means that an argument was not given.

    Raises:
        ValueError: For an unknown name, an argument that the method does not have, or one that is missing.
    """
    given = {name: value for name, value in flat.items() if value is not None}
    if isinstance(method, Method):
        for name in unused_arguments(method, given):
            raise ValueError(f"{name}={given[name]!r}: method={type(method).__name__}(...) already has its arguments.")
        return method
    if not isinstance(method, str):
        raise ValueError(f"method={method!r} must be a name ({', '.join(METHODS)}) or a lightning_ddst.methods.Method.")
    kind = METHODS.find("method", method)
    for name in unused_arguments(method, given):
        raise ValueError(
            f'{name}={given[name]!r}: method="{method}" has no such argument; it has {", ".join(kind.arguments())}.'
        )
    for field in fields(kind):
        if field.default is MISSING and field.default_factory is MISSING and field.name not in given:
            raise ValueError(f'{field.name} is missing: method="{method}" needs it.')
    return kind(**given)


def unused_arguments(method: object, given: Iterable[str]) -> list[str]:
    """Returns the flat arguments that a method does not have: all of them if it is an object.

    Args:
        method: A registered name, or any other value for a method object.
        given: Names of arguments.
    """
    has = METHODS[method].arguments() if isinstance(method, str) and method in METHODS else []
    return [name for name in given if name not in has]
