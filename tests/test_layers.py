"""The order of the package's rooms: each imports only from those below it."""

import ast
from pathlib import Path

import pytest

import lightning_ddst

PACKAGE = Path(lightning_ddst.__file__).parent
ROOMS = (
    *("cli", "loop", "callbacks", "gan", "report", "export", "models", "metrics"),
    *("data", "attached", "methods", "balance", "sparsity", "utils"),
)
FORMER = {"plots", "runs", "speed", "losses", "augmentation", "module"}
"""Former import paths, which import their new ones and are imported by nothing."""
MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")
}


def imported(path):
    """The package's modules that a module imports, also inside of functions, but not for type checking."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").startswith("lightning_ddst")
            and id(node) not in for_types
        ):
            yield node.module.removeprefix("lightning_ddst").lstrip("."), [alias.name for alias in node.names]


def room(module):
    return module.partition(".")[0]


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in ROOMS])
def test_a_room_imports_only_from_rooms_below(module):
    for source, names in imported(MODULES[module]):
        for used in [source] if source else names:
            assert ROOMS.index(room(module)) <= ROOMS.index(room(used)), f"{module} imports {used}"


def test_nothing_imports_a_former_path():
    for module, path in MODULES.items():
        for source, names in imported(path):
            assert room(source) not in FORMER, module
            assert source or not FORMER & {*names}, module


def test_no_modules_import_each_other():
    below = {}
    for module, path in MODULES.items():
        uses = set()
        for source, names in imported(path):
            for target in [source, *(f"{source}.{name}".lstrip(".") for name in names)]:
                if target in MODULES and not target.endswith("__init__"):
                    uses.add(target)
        below[module] = uses

    def visit(module, trail):
        assert module not in trail, " -> ".join([*trail, module])
        if module not in done:
            for used in below[module]:
                visit(used, [*trail, module])
            done.add(module)

    done = set()
    for module in below:
        visit(module, [])


def test_helpers_of_callbacks_import_no_callback():
    for module, path in MODULES.items():
        if module.startswith("callbacks._support"):
            for source, _ in imported(path):
                assert room(source) != "callbacks" or source.startswith("callbacks._support"), module


def test_no_other_file_branches_on_granularities_or_methods():
    """No branch on a name: comparisons and memberships with one of them are in `methods/` and `units/` alone."""
    from lightning_ddst.methods import METHODS
    from lightning_ddst.sparsity import UNITS

    names = {*METHODS, *UNITS} - {"weight"}  # which is a name of parameters, too
    for module, path in MODULES.items():
        if module.startswith(("methods.", "sparsity.units")):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                found = {inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant)} & names
                assert not found, f"{module}:{node.lineno} compares with {found}"
