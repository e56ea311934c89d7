"""The fit that a callback's state belongs to."""

from torch import nn


class LastFit:
    """Decides when a callback's state begins anew: it must not mix modules, and evaluation leaves it readable.

    Attributes:
        evaluates_another: Whether the running evaluation is of another module than the fit's, or of a checkpoint.
    """

    def __init__(self) -> None:
        self.evaluates_another = False
        self._module: nn.Module | None = None
        self._is_fitted = False
        self._fits = False
        self._overwritten = False  # whether a checkpoint was loaded into the module since its last fit

    def starts(self, module: nn.Module, stage: str) -> bool:
        """Notes the start of a fit or an evaluation; call it in ``Callback.setup``.

        Args:
            module: The module.
            stage: The stage that `setup` is called with.

        Returns:
            Whether the state is of another module, and must be forgotten: in a fit of a module that the callback did
            not fit, and in an evaluation of another module before any fit.
        """
        self._fits = stage == "fit"
        belongs = self._module is module
        self._overwritten &= not self._fits
        self.evaluates_another = not self._fits and self._is_fitted and (not belongs or self._overwritten)
        if self._is_fitted and not self._fits:
            return False
        forgets = self._module is not None and (not belongs or (self._fits and not self._is_fitted))
        self._module, self._is_fitted = module, self._fits
        return forgets

    def restores(self) -> bool:
        """Returns whether to restore a state; call it in ``Callback.load_state_dict``.

        An evaluated checkpoint is restored only if there was no fit, whose state it would replace.
        """
        self.evaluates_another = self._overwritten = not self._fits and self._is_fitted
        return not self.evaluates_another
