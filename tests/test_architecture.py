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
        "normalisation",
        "uncertainty",
        "datasets",
        "pyro_state",
        "precision",
        "draw_linear",
        "row_cut",
        "fingerprint",
        "permutation",
        "prefetch",
        "ranks",
        "trees",
    },
    {"arguments", "index_stream"},
    {"layout", "bnn", "container"},
    {"draw_map", "drawing", "minibatch", "capture", "estimates", "networks"},
    {"loader"},
    {"row_reader"},
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
            described = len((ast.get_docstring(node, clean=False) or "").splitlines())
            assert node.end_lineno - node.lineno - described < 60, f"{node.name} is too long"


def public(body, prefix):
    """Public classes, functions and methods of a module, by dotted name; a property's setter is its getter's."""
    for node in body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if any(isinstance(d, ast.Attribute) and d.attr in ("setter", "deleter") for d in node.decorator_list):
            continue
        yield f"{prefix}.{node.name}", node
        if isinstance(node, ast.ClassDef):
            yield from public(node.body, f"{prefix}.{node.name}")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_public_name_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    named = [("module", tree), *public(tree.body, path.stem)]
    assert not [name for name, node in named if not ast.get_docstring(node)]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_command_line_prints(path):
    printing = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not printing or path.name in ("cli.py", "command.py"), f"lines {printing} print; use the logger 'pyro_apd'"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_coloured_in_a_terminal(path):
    """NO_COLOR is kept by having none: no escape codes, and bars in the terminal's own colour."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert "\x1b" not in node.value
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("tqdm", "trange"):
            assert "colour" not in [keyword.arg for keyword in node.keywords]


@pytest.mark.thorough
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
