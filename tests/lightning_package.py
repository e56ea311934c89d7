"""Runs tests with Lightning's other package: LIGHTNING_PACKAGE=pytorch_lightning pytest tests/callbacks.

Tests import `lightning.pytorch`. With this variable they get `pytorch_lightning` by that name, so Trainers, modules and
callbacks of the tests are of that package. The package under test has imported `lightning.pytorch` by then. Its
callbacks stay, since they work under either Trainer; GANModule and others are `lightning_ddst.pytorch_lightning`'s.
"""

import os
import sys
from importlib import import_module
from pkgutil import walk_packages

OTHERS = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}


def _replace_package() -> None:
    import lightning_ddst

    ours = {name: import_module(name) for _, name, _ in walk_packages(lightning_ddst.__path__, "lightning_ddst.")}
    for package, other in OTHERS.items():
        for name in [name for name in sys.modules if f"{name}.".startswith(f"{package}.")]:
            sys.modules[name] = import_module(name.replace(package, other))
        parent, _, child = package.partition(".")
        setattr(sys.modules[parent], child, sys.modules[package])
    classes = ours.pop("lightning_ddst.pytorch_lightning")
    for module in (lightning_ddst, *ours.values()):
        for name, kind in vars(classes).items():
            if name.endswith(("GANModule", "DataModule", "CheckpointIO")) and name in vars(module):
                setattr(module, name, kind)


if os.environ.get("LIGHTNING_PACKAGE") == "pytorch_lightning":
    _replace_package()
