"""Gives the tests another package of Lightning's: LIGHTNING_PACKAGE=pytorch_lightning pytest tests/callbacks ...

Tests import `lightning.pytorch`. With this variable they get `pytorch_lightning` by that name, and so its Trainers, modules
and callbacks. The package under test has imported its own by then. The classes of `lightning_ddst.pytorch_lightning` that
its Trainer needs stand in for those of `lightning_ddst`; callbacks do not: they work under either Trainer.
"""

import os
import sys
from importlib import import_module
from pkgutil import walk_packages

OTHER = os.environ.get("LIGHTNING_PACKAGE") == "pytorch_lightning"


def replace_package() -> None:
    """Replaces the package if the variable is set."""
    if not OTHER or sys.modules.get("lightning.pytorch") is sys.modules.get("pytorch_lightning", 0):
        return
    import lightning

    import lightning_ddst

    for module in walk_packages(lightning_ddst.__path__, "lightning_ddst."):
        import_module(module.name)
    for name in [name for name in sys.modules if name.startswith(("lightning.pytorch", "lightning.fabric"))]:
        _, package, rest = [*name.split(".", 2), ""][:3]
        other = {"pytorch": "pytorch_lightning", "fabric": "lightning_fabric"}[package]
        sys.modules[name] = import_module(f"{other}.{rest}".rstrip("."))
    lightning.pytorch, lightning.fabric = sys.modules["lightning.pytorch"], sys.modules["lightning.fabric"]
    ours = vars(sys.modules["lightning_ddst.pytorch_lightning"])
    for name in [name for name in ours if name.endswith(("Module", "CheckpointIO")) and name in ours]:
        if not ours[name].__module__.startswith("lightning_ddst"):
            continue
        for module in [m for n, m in sys.modules.items() if n.startswith("lightning_ddst")]:
            if hasattr(module, name) and vars(module) is not ours:
                setattr(module, name, ours[name])
