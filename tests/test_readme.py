# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The README's examples run unchanged."""

import re
import warnings
from pathlib import Path

import pytest

import pyro_apd

README = Path(__file__).parents[1] / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.fixture(params=["little work", pytest.param("all", marks=pytest.mark.thorough)])
def work(request, monkeypatch, tmp_path):
    """The folder that examples run in. With little work there are fewer steps, and all else is as a reader runs it."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        if request.param == "little work":

            class ShortMCMC(pyro_apd.MCMC):
                def __init__(self, kernel, *args, **settings):
                    kernel.thinning = 2
                    super().__init__(kernel, *args, **settings)

            monkeypatch.setattr(pyro_apd, "MCMC", ShortMCMC)
            warnings.simplefilter("ignore")  # so little work leaves chains unmixed, and they say so
        yield tmp_path


@pytest.mark.slow
def test_the_twenty_lines(work, capsys):
    code, _, trained, chains, *_ = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    scope = {}
    exec(compile(code, str(README), "exec"), scope)
    assert (work / "posterior.safetensors").exists()
    accuracy = (scope["labels"].mode(0).values == scope["data"].y_test).float().mean()
    assert accuracy > 0.9
    assert "generator" in capsys.readouterr().out
    exec(compile(trained, str(README), "exec"), scope)
    assert set(scope["of_last_layer"].get_samples()) == {"net.2.weight", "net.2.bias"}
    assert (work / "last_layer.safetensors").exists()
    exec(compile(chains, str(README), "exec"), scope)
    assert scope["mcmc"].get_samples(group_by_chain=True)["out.bias"].shape == (4, 200, 10)
    assert (work / "run.ckpt").exists()
    assert "configurational all" in capsys.readouterr().out


@pytest.mark.slow
def test_the_lines_for_tables(capsys):
    _, table, *_ = blocks("python")
    assert len([line for line in table.splitlines() if line.strip()]) < 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(table, str(README), "exec"), {})
    assert 0.8 < float(capsys.readouterr().out) < 0.98


def test_the_commands_exist():
    makefile = (README.parent / "Makefile").read_text()
    for command in re.findall(r"^make (\w+)", "\n".join(blocks("bash")), flags=re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE)


def test_local_links_and_pictures_exist():
    prose = re.sub(r"```.*?```", "", README.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#]+)\)", prose)
    assert len(targets) >= 3
    for target in targets:
        if not target.startswith("http"):
            assert (README.parent / target).exists(), target


def test_what_the_file_section_says_exists():
    section = "\n".join(blocks("python")[4:])
    for name in re.findall(r"apd\.([\w.]+)\(", section):
        thing = pyro_apd
        for part in name.split("."):
            thing = getattr(thing, part)
    for name in re.findall(r"posterior\.(\w+)\(", section):
        assert hasattr(pyro_apd.DistilledPosterior, name), name
    compile(section, str(README), "exec")
