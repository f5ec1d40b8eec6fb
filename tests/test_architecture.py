# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The layout of the package: which room may import from which, and how large its parts may be."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import pyro_apd

PACKAGE = Path(pyro_apd.__file__).parent

# From the lowest level up. A module imports from lower levels and from its own room. A new room is placed here first.
LEVELS = [
    {"errors"},
    {"_version", "datasets", "runtime"},
    {"data", "generators", "metrics", "uncertainty"},
    {"models"},
    {"export", "predictive"},
    {"kernels", "posterior"},
    {"chains", "page"},
    {"distillation"},
    {"baselines"},
    {"diagnostics"},
    {"active_learning", "adversarial", "ood", "sklearn"},
    {"cli"},
    {"__main__"},
]
# The same within rooms that have folders; "" is the room's own modules.
INNER_LEVELS = {
    "kernels": [{"adaptation"}, {"engine"}, {""}],
    "chains": [{"stores"}, {""}],
    "diagnostics": [{""}, {"comparison"}, {"mixing"}, {"arviz_export", "plots"}, {"html"}],
}
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_ROOMS = 26
MAX_PRIVATE_PARAMETERS = 10


@cache
def sources():
    """Syntax tree by dotted name below the package, ``kernels.sgld``; a folder stands for its ``__init__``."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = (path, ast.parse(path.read_text()))
    return trees


def modules():
    """What is not an ``__init__``, which only collects names."""
    return {name: found for name, found in sources().items() if found[0].name != "__init__.py"}


@cache
def arrows(name):
    """Modules of the package that a module imports, anywhere in it, but for what only the type checker reads."""
    _, tree = sources()[name]
    guarded = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if node in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pyro_apd":
            parent = node.module.removeprefix("pyro_apd").lstrip(".")
            for alias in node.names:
                full = f"{parent}.{alias.name}".lstrip(".")
                found.add(full if full in sources() else parent)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("pyro_apd.") for a in node.names if a.name.startswith("pyro_apd.")}
    return found - {name, ""}


def heights(levels):
    return {room: height for height, level in enumerate(levels) for room in level}


def room(name):
    return name.split(".")[0]


def folder(name):
    """The folder within its room that a module is in, ``""`` for the room itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 2 or (len(parts) == 2 and sources()[name][0].name == "__init__.py") else ""


def test_a_module_imports_only_from_rooms_below():
    height = heights(LEVELS)
    assert not {room(name) for name in modules()} - set(height), "rooms without a level"
    upward = [
        f"{name} -> {target}"
        for name in modules()
        for target in arrows(name)
        if room(target) != room(name) and height[room(target)] >= height[room(name)]
    ]
    assert not upward


def test_folders_within_a_room_have_levels_too():
    upward = []
    for name in modules():
        if room(name) not in INNER_LEVELS:
            continue
        height = heights(INNER_LEVELS[room(name)])
        inside = [target for target in arrows(name) if room(target) == room(name) and folder(target) != folder(name)]
        upward += [f"{name} -> {t}" for t in inside if height[folder(t)] >= height[folder(name)]]
    assert not upward


def test_no_imports_go_in_a_circle():
    """Removes modules of which all imports are removed, until none is left."""
    left = {name: arrows(name) & set(modules()) for name in modules()}
    while settled := {name for name, targets in left.items() if not targets & set(left)}:
        left = {name: targets for name, targets in left.items() if name not in settled}
    assert not left


def test_the_rooms_can_be_counted():
    entries = {
        path.name
        for path in PACKAGE.iterdir()
        if path.name not in ("__init__.py", "__pycache__") and (path.is_dir() or path.suffix == ".py")
    }
    assert len(entries) <= MAX_ROOMS


def test_modules_and_functions_stay_readable():
    too_long = []
    for path, tree in sources().values():
        name = path.relative_to(PACKAGE)
        if len(path.read_text().splitlines()) > MAX_MODULE_LINES:
            too_long.append(str(name))
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                described = len((ast.get_docstring(node, clean=False) or "").splitlines())
                if node.end_lineno - node.lineno - described >= MAX_FUNCTION_LINES:
                    too_long.append(f"{name}: {node.name}")
    assert not too_long


# Parameters and attributes that join the rooms of sampling, where strict types help most.
SEAMS = {"kernel", "chain", "chains", "group", "source", "store", "posterior"}


def annotated(tree):
    """Names of parameters and annotated attributes with their annotations, None where there is none."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            yield from ((argument.arg, argument.annotation) for argument in arguments)
        elif isinstance(node, ast.AnnAssign):
            yield getattr(node.target, "id", getattr(node.target, "attr", "")), node.annotation


def untyped(name, annotation):
    """Whether a parameter or attribute with the name of a seam has no type, or any."""
    is_any = annotation is None or any(getattr(node, "id", "") == "Any" for node in ast.walk(annotation))
    return name.lstrip("_") in SEAMS and is_any


def test_seams_of_sampling_are_typed():
    found = [
        f"{module}: {name}"
        for module, (_, tree) in modules().items()
        if room(module) in ("kernels", "chains")
        for name, annotation in annotated(tree)
        if untyped(name, annotation)
    ]
    assert not found
    code = "def f(kernel, store: Any | None, size: Any): ...\nclass C:\n    _chain: list[Any]\n    group: Group"
    assert [name for name, a in annotated(ast.parse(code)) if untyped(name, a)] == ["kernel", "store", "_chain"]


def test_adaptation_does_not_know_the_engine():
    assert not [
        f"{name} -> {target}"
        for name in modules()
        if folder(name) == "adaptation" and room(name) == "kernels"
        for target in arrows(name)
        if target.startswith("kernels.engine")
    ]


def parameters(function):
    """Names of a function's parameters without ``self`` and ``cls``."""
    spec = function.args
    names = [argument.arg for argument in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


# Functions and constructors that users call, with a keyword argument for each thing that can be chosen.
PUBLIC_DOORS = {
    "active_learning.loop.run",
    "adversarial.evaluation.evaluate",
    "baselines.dark_knowledge.dark_knowledge",
    "baselines.deep_ensemble.deep_ensemble",
    "baselines.map_estimate.map_estimate",
    "baselines.mc_dropout.mc_dropout",
    "baselines.swag.swag",
    "chains.driver.MCMC.__init__",
    "diagnostics.arviz_export.export.to_arviz",
    "diagnostics.html.report.report",
    "distillation.offline.distill",
    "distillation.online.distill_online",
    "kernels.base.StochasticGradientKernel.__init__",
    "models.bnn.BNN.__init__",
    "sklearn.classifier.BNNClassifier.__init__",
    "sklearn.regressor.BNNRegressor.__init__",
    "posterior.networks.PosteriorNetworks.export_onnx",
}


def test_only_public_doors_have_many_parameters():
    def functions(body, prefix):
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from functions(node.body, f"{prefix}.{node.name}")
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{prefix}.{node.name}", node
                yield from functions(node.body, f"{prefix}.{node.name}")

    many = {
        name
        for module, (_, tree) in sources().items()
        for name, function in functions(tree.body, module)
        if len(parameters(function)) > MAX_PRIVATE_PARAMETERS
    }
    assert many == PUBLIC_DOORS


def test_the_formatter_is_not_switched_off():
    assert not [name for name, (path, _) in sources().items() if re.search(r"# fmt: *(skip|off)", path.read_text())]


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


def test_every_public_name_has_a_docstring():
    named = [
        pair for name, (_, tree) in sources().items() for pair in [(name or "pyro_apd", tree), *public(tree.body, name)]
    ]
    assert not [name for name, node in named if not ast.get_docstring(node)]


def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_only_the_command_line_prints():
    printing = [
        f"{name}: line {call.lineno}"
        for name, (_, tree) in modules().items()
        for call in calls(tree)
        if getattr(call.func, "id", "") == "print" and room(name) != "cli"
    ]
    assert not printing, "use the logger 'pyro_apd'"


def test_nothing_is_coloured_in_a_terminal():
    """NO_COLOR is kept by having none: no escape codes, and bars in the terminal's own colour."""
    for name, (_, tree) in modules().items():
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.Constant) and isinstance(node.value, str) and "\x1b" in node.value), name
        for call in calls(tree):
            if getattr(call.func, "id", "") in ("tqdm", "trange"):
                assert "colour" not in [keyword.arg for keyword in call.keywords], name


@pytest.mark.slow
def test_drawing_from_a_file_needs_no_training_code():
    code = (
        "import sys; import pyro_apd.posterior; "
        "training = ('pyro_apd.distillation', 'pyro_apd.kernels', 'pyro_apd.chains', 'pyro_apd.models.potential'); "
        "assert not any(m.startswith(training) for m in sys.modules)"
    )
    # `import pyro_apd` itself offers everything; what ships must stand without it being used.
    program = (
        "import types, sys; p = types.ModuleType('pyro_apd'); "
        f"p.__path__ = [{str(PACKAGE)!r}]; p.__version__ = '0'; sys.modules['pyro_apd'] = p; {code}"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_no_public_function_hides_a_module():
    """``import pyro_apd.x.y as m`` must work, which a function of the name of a folder would prevent."""
    code = "import pyro_apd.distillation.objective as objective; assert objective.__file__"
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in sources():
        if "." not in name and name:
            assert getattr(pyro_apd, name, sys.modules.get(f"pyro_apd.{name}")) in (
                None,
                sys.modules.get(f"pyro_apd.{name}"),
            ), name


@pytest.mark.slow
def test_applications_are_imported_when_they_are_used():
    code = (
        "import sys; import pyro_apd as apd; "
        "rooms = ('ood', 'diagnostics', 'baselines', 'active_learning', 'adversarial', 'datasets'); "
        "assert not any(f'pyro_apd.{room}' in sys.modules for room in rooms); "
        "assert all(getattr(apd, room).__name__ == f'pyro_apd.{room}' for room in rooms); "
        "assert set(rooms) <= set(dir(apd)); assert not hasattr(apd, 'absent')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    for name in pyro_apd.__all__:
        assert getattr(pyro_apd, name).__doc__, f"{name} has no docstring"
