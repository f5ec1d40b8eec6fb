# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Every code block of the site and the README runs, with a small workload; links and paths exist."""

import re
import runpy
import tomllib
import warnings
from functools import partial
from pathlib import Path

import pytest

import pyro_apd as apd
from pyro_apd.diagnostics.html import pictures
from tests.support.exported import subspace_posterior
from tests.test_architecture import LEVELS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)


def run(path, scope, chosen=slice(None)):
    for block in blocks(path)[chosen]:
        exec(compile(block, str(path), "exec"), scope)


@pytest.fixture
def little_work(monkeypatch, tmp_path):
    """The package with few data, short chains, and reports with empty pictures; everything else is unchanged."""

    class ShortMCMC(apd.MCMC):
        def __init__(self, kernel, num_samples, warmup_steps=5, **settings):
            kernel.thinning = min(kernel.thinning, 2)
            settings |= {"disable_progbar": True}
            super().__init__(kernel, min(num_samples, 20), min(warmup_steps, 5), **settings)

    def few_digits(**settings):
        data = digits(**settings)
        return apd.datasets.Dataset(data.x_train[:400], data.y_train[:400], data.x_test[:100], data.y_test[:100])

    student, digits = apd.baselines.dark_knowledge, apd.datasets.digits
    monkeypatch.setattr(apd.datasets, "digits", few_digits)
    monkeypatch.setattr(apd, "MCMC", ShortMCMC)
    monkeypatch.setattr(apd, "distill", partial(apd.distill, progress=False))
    monkeypatch.setattr(apd.baselines, "dark_knowledge", partial(student, num_steps=3, progress=False))
    monkeypatch.setattr(pictures, "picture", lambda draw, size, caption: pictures.Picture("data:", "data:", caption, 1))
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # chains this short are not mixed, and warn about it
        yield tmp_path


@pytest.mark.slow
def test_every_block_runs(little_work, capsys):
    scope = {}
    run(DOCS / "getting_started.md", scope)
    assert scope["labels"].shape == (100, len(scope["data"].x_test))
    assert scope["doubt"].shape == (len(scope["data"].x_test),)
    run(DOCS / "how_to.md", scope)
    assert {"small.safetensors", "report.html", "chains.nc", "run.ckpt"} <= {
        path.name for path in little_work.iterdir()
    }
    data = scope["data"]
    scope |= {"x_test": data.x_test, "y_test": data.y_test, "x_noise": apd.datasets.noise(data.x_test)}
    run(DOCS / "diagnostics.md", scope)
    assert scope["fidelity"].status
    few = slice(0, 20)
    scope |= {"bnn": scope["model"], "x": data.x_test[few], "y": data.y_test[few]}
    run(ROOT / "README.md", scope, slice(4, 5))
    assert scope["scores"]["mutual_information"].shape == (20,)
    capsys.readouterr()


@pytest.mark.thorough
def test_the_readme_ships_what_it_made(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    posterior, bnn = subspace_posterior()
    run(ROOT / "README.md", {"posterior": posterior, "bnn": bnn}, slice(5, 6))
    assert (tmp_path / "posterior.onnx").exists()


@pytest.mark.thorough
def test_the_page_on_shipping_runs(little_work):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    scope = {}
    run(DOCS / "ship_it.md", scope)
    assert scope["answer"]["mutual_information"].shape == (100,)
    assert scope["mean"].shape == (100, 10)
    assert (little_work / "posterior.pt2").exists()


def test_no_page_with_code_is_forgotten():
    # The code of what_is_refused.md is tested in tests/refusals.
    pages = {path.name for path in PAGES if blocks(path)} - {"what_is_refused.md"}
    assert pages == {"getting_started.md", "how_to.md", "diagnostics.md", "ship_it.md"}
    assert len(blocks(ROOT / "README.md")) == 6


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_within_the_site(page):
    made = {"results.md", "tutorials/index.md"} | {f"tutorials/{p.stem}.md" for p in (ROOT / "tutorials").glob("*.py")}
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", prose):
        if not target.startswith("http") and target not in made:
            assert (DOCS / target).exists(), target


def test_paths_in_the_contributing_guide_exist():
    """Paths in backticks are below the root, or below the package."""
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    # `kernels/sgld.py` or `chains/stores/`; globs and bare names of files stand for something else.
    paths = set(re.findall(r"`([\w.]+/[\w./]*)`", guide))
    assert len(paths) > 30
    folders = (ROOT, ROOT / "pyro_apd")
    assert not sorted(path for path in paths if not any((folder / path).exists() for folder in folders))


def test_rooms_in_the_contributing_guide_have_the_levels_of_the_architecture():
    diagram = re.search(r"^ level\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL | re.MULTILINE)[
        1
    ]
    rows = [re.split(r" {5,}", line.strip()) for line in diagram.splitlines()]
    drawn = {int(row[0].split()[0]): row for row in rows}
    for level, rooms in enumerate(LEVELS, start=1):
        words = set(" ".join(drawn[level]).split())
        assert rooms <= words, (level, rooms - words)
    assert len(drawn) == len(LEVELS)


def test_the_version_is_stated_once():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {apd.__version__}\n" in citation
    assert f"## {apd.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "pyro_apd._version.__version__"}


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in [*PAGES, *DOCS.glob("reference/*.md")]:
        assert f": {page.relative_to(DOCS).as_posix()}" in menu, page.name


def test_every_public_name_is_in_the_reference():
    text = "".join(path.read_text() for path in DOCS.glob("reference/*.md"))
    rooms = {"baselines", "diagnostics", "export", "schedules"}
    listed = set(re.findall(r"^::: pyro_apd\.(\w+)", text, flags=re.MULTILINE))
    assert set(apd.__all__) - rooms <= listed
    assert {f"plots.{name}" for name in ("trace", "decision_surfaces")} <= set(re.findall(r"(plots\.\w+)", text))


def test_pictures_are_those_of_the_tutorials():
    images = runpy.run_path(str(DOCS / "site" / "images.py"))
    for name, source in images["PICTURES"].items():
        assert (DOCS / "images" / f"{name}.png").read_bytes() == images["picture"](*source), "run docs/site/images.py"
