# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The README's examples run unchanged."""

import re
from pathlib import Path

import pytest

import pyro_apd

README = Path(__file__).parents[1] / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.slow
def test_the_twenty_lines(tmp_path, monkeypatch, capsys):
    code, chains, _ = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(code, str(README), "exec"), scope)
    assert (tmp_path / "posterior.safetensors").exists()
    accuracy = (scope["labels"].mode(0).values == scope["data"].y_test).float().mean()
    assert accuracy > 0.9
    assert "generator" in capsys.readouterr().out
    exec(compile(chains, str(README), "exec"), scope)
    assert scope["mcmc"].get_samples(group_by_chain=True)["out.bias"].shape == (4, 200, 10)
    assert (tmp_path / "run.ckpt").exists()
    assert "configurational all" in capsys.readouterr().out


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
    *_, section = blocks("python")
    for name in re.findall(r"apd\.([\w.]+)\(", section):
        thing = pyro_apd
        for part in name.split("."):
            thing = getattr(thing, part)
    for name in re.findall(r"posterior\.(\w+)\(", section):
        assert hasattr(pyro_apd.DistilledPosterior, name), name
    compile(section, str(README), "exec")
