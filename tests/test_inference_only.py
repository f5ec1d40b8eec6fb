# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Loading a posterior and predicting with it needs torch, Pyro, numpy and safetensors, and what these need."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import pyro_apd as apd

ROOT = Path(__file__).parents[1]
POSTERIOR = ROOT / "tests" / "files" / "posterior_v3_subspace_int8.safetensors"
# tqdm is a dependency of Pyro, which imports it at once; opt_einsum is one of Pyro's and optional for torch.
NEEDED = {"torch", "pyro", "pyroapi", "numpy", "safetensors", "tqdm", "opt_einsum"}

# Finds no package but those that are needed, those of torch, and the standard library.
BLOCK = """
import json, sys
from importlib.metadata import packages_distributions
needed = set(json.loads(sys.argv[1]))
torch_needs = {"typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec"}
torch_needs |= {"setuptools"}
others = set(packages_distributions()) - needed - torch_needs - {"torchgen", "functorch", "pyro_apd"}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in others:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
"""
PREDICT = """
import torch
import pyro_apd as apd
posterior = apd.DistilledPosterior.load(sys.argv[2])
draws = posterior.get_samples(3, seed=0)
assert all(len(value) == 3 and value.isfinite().all() for value in draws.values())
posterior.save(sys.argv[3])
shapes = {site.name: site.shape for site in posterior.layout}
print(json.dumps({name: list(shape) for name, shape in shapes.items()}))

bnn = apd.BNN(torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)))
layout = type(posterior.layout)({site: prior.sample().shape for site, prior in bnn.priors.items()})
from pyro_apd.generators.low_rank import LowRankGenerator
generator = LowRankGenerator.of(torch.zeros(layout.size), torch.randn(2, layout.size), torch.ones(layout.size))
small, x = apd.DistilledPosterior(layout, generator).bind(bnn), torch.randn(6, 4)
assert small.ensemble(3, outputs=["mean", "mutual_information"])(x)["mean"].shape == (6, 3)
assert apd.Predictive(bnn, guide=small, num_samples=3)(x)["obs"].shape == (3, 6)
assert apd.outputs(bnn, small.get_samples(3), x).probs_SNK.shape == (3, 6, 3)
"""
ASK = """
for ask in (
    lambda: apd.diagnostics.to_arviz(draws),
    lambda: apd.diagnostics.plots.trace(torch.randn(1, 9)),
    lambda: apd.datasets.digits(),
    lambda: small.export_onnx("no.onnx"),
):
    try:
        ask()
    except ImportError as error:
        print(error)
    else:
        raise AssertionError("nothing was missing")
"""


def python(executable, program, *arguments):
    command = [executable, "-c", program, json.dumps(sorted(NEEDED)), str(POSTERIOR), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_nothing_else_is_imported(tmp_path):
    """And what is asked for that needs more names its package, and how to install it."""
    shapes, *errors = python(sys.executable, BLOCK + PREDICT + ASK, tmp_path / "p.safetensors")
    assert set(json.loads(shapes)) == set(apd.DistilledPosterior.load(POSTERIOR).layout.names)
    assert len(errors) == 4
    for error, package in zip(errors, ("arviz", "matplotlib", "demo", "onnx"), strict=True):
        assert package in error
        assert "pip install" in error


@pytest.mark.thorough
def test_the_documented_set_is_enough(tmp_path):
    """An environment with what docs/ship_it.md installs, and nothing else."""
    text = (ROOT / "docs" / "ship_it.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("pip install") and "onnx" not in line]
    assert len(commands) == 2
    venv.create(tmp_path / "venv", with_pip=True)
    executable = str(tmp_path / "venv" / "bin" / "python")
    for command in commands:
        packages = command.removeprefix("pip install").replace("pyro-apd", "").split()
        install = [executable, "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), *packages]
        subprocess.run(install, check=True)
    python(executable, "import json, sys" + PREDICT, tmp_path / "p.safetensors")


@pytest.mark.slow
def test_importing_the_package_imports_nothing_else():
    code = (
        "import sys, torch, pyro; before = set(sys.modules); import pyro_apd; "
        "added = {name for name in set(sys.modules) - before}; "
        "assert added == {'pyro_apd', 'pyro_apd._version'}, sorted(added); "
        "assert set(pyro_apd.__all__) <= set(dir(pyro_apd)); "
        "assert pyro_apd.SGLD is pyro_apd.SGLD; assert pyro_apd.kernels.SGLD is pyro_apd.SGLD"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
