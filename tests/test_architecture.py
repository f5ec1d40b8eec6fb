# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Data flows one way: a module imports only from floors below its own. A new module is placed here first."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_apd

PACKAGE = Path(pyro_apd.__file__).parent

# From the ground up; a module may import from lower floors, and from its own room.
FLOORS = [
    {"accumulators"},
    {
        "errors",
        "metrics",
        "uncertainty",
        "datasets",
        "pyro_state",
        "precision",
        "draw_linear",
        "row_cut",
        "fingerprint",
    },
    {"layout", "bnn", "container"},
    {"draw_map", "drawing", "minibatch", "capture", "estimates", "networks"},
    {"scaling", "observed_site"},
    {"summaries"},
    {"reductions"},
    {"potential", "predictive"},
    {"kernels", "generators"},
    {"artifact"},
    {"posterior", "chains"},
    {"distill"},
    {"diagnostics", "baselines"},
    {"active_learning", "adversarial", "ood"},
    {"demo", "inspection"},
    {"cli"},
]


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name not in {"__init__.py", "__main__.py"})


def room(name):
    """The first part below the package: ``kernels`` for ``pyro_apd.kernels.sgld``."""
    return name.split(".")[1] if "." in name else ""


def imported(path):
    """Names within the package that a module imports, where it runs and not only where it is type-checked."""
    tree = ast.parse(path.read_text())
    guarded = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if node in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pyro_apd":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("pyro_apd."))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_floors_below(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    height = {name: level for level, floor in enumerate(FLOORS) for name in floor}
    assert own in height, f"{own} has no floor"
    for name in imported(path):
        target = room(name)
        if target == own or target not in height:
            continue
        assert height[target] < height[own], f"{own} imports {name}, which is not below it"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_stay_readable(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 500
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 75, f"{node.name} is too long"


def test_drawing_from_a_file_needs_no_training_code():
    code = (
        "import sys; import pyro_apd.posterior; "
        "training = ('pyro_apd.distill', 'pyro_apd.kernels', 'pyro_apd.potential'); "
        "assert not any(m.startswith(training) for m in sys.modules)"
    )
    # `import pyro_apd` itself offers everything; what ships must stand without it being used.
    program = (
        "import types, sys; p = types.ModuleType('pyro_apd'); "
        f"p.__path__ = [{str(PACKAGE)!r}]; p.__version__ = '0'; sys.modules['pyro_apd'] = p; {code}"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_public_names():
    for name in pyro_apd.__all__:
        assert getattr(pyro_apd, name).__doc__, f"{name} has no docstring"
