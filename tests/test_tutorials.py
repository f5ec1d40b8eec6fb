# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Tutorials run, and their notebooks are the sources, executed completely.

Here the sources run as scripts, which needs no Jupyter; ``make tutorials`` runs the notebooks with nbmake.
"""

import json
import re
import runpy
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pytest

from pyro_apd import DistillationWarning, WarmupWarning

FOLDER = Path(__file__).parents[1] / "tutorials"
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
MOST_BYTES = 1_000_000


def parts_of(source, is_prose):
    """Code cells of a percent script, or its prose cells, without blank lines at either end."""
    parts = re.split(r"^# %%(.*)\n", source.read_text(), flags=re.MULTILINE)[1:]
    return [b.strip() for kind, b in zip(parts[::2], parts[1::2], strict=True) if ("[markdown]" in kind) == is_prose]


def cells(source):
    return parts_of(source, is_prose=False)


def paragraphs(source):
    return [re.sub(r"^# ?", "", body, flags=re.MULTILINE).strip() for body in parts_of(source, is_prose=True)]


def notebook_of(source):
    return json.loads(source.with_suffix(".ipynb").read_text())


def test_there_are_tutorials():
    assert [path.name[:3] for path in SOURCES] == [f"{number:02d}_" for number in range(1, 13)]
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {path.stem for path in SOURCES}


# The others run in `make thorough`: what they call has tests of its own.
USUAL = ("01_first_distilled_posterior",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [pytest.param(path, marks=[] if path.stem in USUAL else pytest.mark.thorough) for path in SOURCES],
    ids=lambda path: path.stem,
)
def test_it_runs(source, monkeypatch):
    monkeypatch.setenv("PYRO_APD_TUTORIAL_QUICK", "1")
    with warnings.catch_warnings():
        for category in (WarmupWarning, DistillationWarning):
            warnings.simplefilter("default", category)  # with so little work chains are not mixed, and warn about it
        scope = runpy.run_path(str(source))
    plt.close("all")
    pyro.clear_param_store()
    assert scope["QUICK"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_its_notebook_is_the_source_executed(source):
    found = notebook_of(source)["cells"]
    prose = ["".join(cell["source"]).strip() for cell in found if cell["cell_type"] == "markdown"]
    assert prose == paragraphs(source), "run tutorials/execute.py --text"
    code = [cell for cell in found if cell["cell_type"] == "code"]
    assert ["".join(cell["source"]).strip() for cell in code] == cells(source), "run tutorials/execute.py"
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_its_notebook_is_small_and_says_nothing_of_the_machine(source):
    assert source.with_suffix(".ipynb").stat().st_size < MOST_BYTES
    notebook = notebook_of(source)
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
    text = json.dumps(notebook)
    assert not re.search(r"/(?:home|root|Users|work|tmp)/", text)
    assert "it/s" not in text, "a progress bar"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_its_links_lead_somewhere(source):
    prose = "\n".join(line for line in source.read_text().splitlines() if line.startswith("# "))
    for target in re.findall(r"\]\(([^)#\s]+)\)", prose):
        if not target.startswith("http"):
            file = FOLDER / target
            assert file.exists() or file.with_suffix(".py").exists(), target
