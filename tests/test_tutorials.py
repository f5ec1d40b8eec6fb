# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Tutorials run, and their notebooks are what the sources say, executed and whole."""

import json
import re
import runpy
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pytest

FOLDER = Path(__file__).parents[1] / "tutorials"
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
# Those that tutorials/execute.py has been run for.
EXECUTED = [path for path in SOURCES if path.with_suffix(".ipynb").exists()]


def cells(source):
    """Code cells of a percent script, without blank lines at either end."""
    parts = re.split(r"^# %%(.*)\n", source.read_text(), flags=re.MULTILINE)[1:]
    return [body.strip() for kind, body in zip(parts[::2], parts[1::2], strict=True) if "[markdown]" not in kind]


def notebook_of(source):
    return json.loads(source.with_suffix(".ipynb").read_text())


def test_there_are_tutorials():
    assert len(SOURCES) >= 6
    assert {path.stem for path in FOLDER.glob("*.ipynb")} <= {path.stem for path in SOURCES}


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_it_runs(source, monkeypatch):
    monkeypatch.setenv("PYRO_APD_TUTORIAL_QUICK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # so little work leaves chains unmixed, and they say so
        scope = runpy.run_path(str(source))
    plt.close("all")
    pyro.clear_param_store()
    assert scope["QUICK"]


@pytest.mark.parametrize("source", EXECUTED, ids=lambda path: path.stem)
def test_its_notebook_is_the_source_executed(source):
    code = [cell for cell in notebook_of(source)["cells"] if cell["cell_type"] == "code"]
    assert ["".join(cell["source"]).strip() for cell in code] == cells(source), "run tutorials/execute.py"
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("source", EXECUTED, ids=lambda path: path.stem)
def test_its_notebook_says_nothing_of_the_machine(source):
    text = "".join(
        "".join(output.get("text", "")) for cell in notebook_of(source)["cells"] for output in cell.get("outputs", [])
    )
    assert not re.search(r"/(?:home|root|Users|work|tmp)/", text)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_its_links_lead_somewhere(source):
    for target in re.findall(r"\]\(([^)#\s]+)\)", source.read_text()):
        if not target.startswith("http"):
            file = FOLDER / target
            assert file.exists() or file.with_suffix(".py").exists(), target
