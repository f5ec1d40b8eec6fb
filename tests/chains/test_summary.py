# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What a run says of its kernel, step size, excursions and warnings, in the driver, in a file, and to people."""

import warnings

import pytest
import torch

import pyro_apd as apd
from pyro_apd.chains.summary import sampler_summary, summary_lines
from pyro_apd.cli.inspect import describe
from pyro_apd.kernels.adaptation.drift import Drift, DriftWatch
from pyro_apd.kernels.adaptation.excursions import ExcursionWatch
from tests.support.models import Conjugate

PROBLEM = Conjugate()


@pytest.fixture
def drifting(monkeypatch):
    monkeypatch.setattr(DriftWatch, "drifts", lambda self, temperature: [Drift("potential", None, 3.0, 1.0)])


def run(step_size=1e-3, num_samples=30, **settings):
    mcmc = apd.MCMC(apd.SGLD(PROBLEM.full, step_size, seed=0), num_samples, 5, disable_progbar=True, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", apd.WarmupWarning)
        warnings.simplefilter("ignore", apd.ExcursionWarning)
        mcmc.run(PROBLEM.x, PROBLEM.y)
    return mcmc


def test_a_run_without_warnings():
    mcmc = run()
    found = sampler_summary(mcmc)
    expected = {"kernel": "SGLD", "step_size": pytest.approx(1e-3), "is_automatic": False, "excursions": 0}
    assert found == expected | {"warnings": []}
    assert summary_lines(found) == ["SGLD, step size 0.001; no excursions; no warnings"]
    assert mcmc.diagnostics()["warnings"] == {"chain 0": []}


@pytest.mark.usefixtures("drifting")
def test_a_warning_is_kept_and_told_once():
    mcmc = run("auto", num_chains=2)
    found = sampler_summary(mcmc)
    assert found["is_automatic"]
    assert len(found["warnings"]) == 1  # the chains share it
    assert mcmc.diagnostics()["warnings"]["chain 1"] == found["warnings"]
    first, second = summary_lines(found)
    assert first.startswith("SGLD, step size ")
    assert first.endswith(", chosen during warm-up; no excursions")
    assert second.startswith("warning: The warm-up of 5 Langevin steps was too short")


@pytest.mark.usefixtures("drifting")
def test_the_file_says_it(tmp_path):
    mcmc = run("auto")
    apd.distill(mcmc, num_steps=2, seed=0, progress=False).save(tmp_path / "posterior.safetensors")
    text = describe(tmp_path / "posterior.safetensors")
    assert "sampler     SGLD, step size " in text
    assert f"  warning: {sampler_summary(mcmc)['warnings'][0]}" in text.splitlines()
    assert "is_automatic" not in text


def test_excursions_are_counted_over_chains(monkeypatch):
    monkeypatch.setattr(ExcursionWatch, "marked", lambda self: [[3, 4]])
    mcmc = run(num_chains=2, chain_method="sequential")
    found = sampler_summary(mcmc)
    assert found["excursions"] == 4
    assert summary_lines(found)[0] == "SGLD, step size 0.001; 4 excursions"
    assert summary_lines(found | {"excursions": 1})[0].endswith("; 1 excursion")
    assert summary_lines(found)[1].startswith("warning: 2 kept draws of 30 per chain are excursions")


def test_chains_that_diverged_are_told():
    class Run:
        kernel = apd.SGLD(PROBLEM.full, 1e-3)
        diverged_chains = (2,)
        _diagnostics = ({"step_size": torch.tensor([1e-3])},)

    assert summary_lines(sampler_summary(Run()))[1].startswith("warning: Chains [2] diverged")


def test_of_other_kernels_the_name_alone():
    class Run:
        kernel = "NUTS"

    assert summary_lines(sampler_summary(Run())) == ["str"]
    assert sampler_summary({"w": torch.zeros(3)}) == {}
    assert summary_lines({}) == []
