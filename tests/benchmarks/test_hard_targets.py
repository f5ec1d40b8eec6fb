# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The references of ``benchmarks.hard_targets``, and what it counts."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from benchmarks import common, hard_targets
from benchmarks.hard_targets import TARGETS, Target, by_entry, weighted_moments


@pytest.fixture(autouse=True)
def _double_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def test_there_are_ten_targets():
    assert len(TARGETS) == 10


@pytest.mark.slow
def test_importance_sampling_finds_moments_in_closed_form(monkeypatch):
    monkeypatch.setattr(hard_targets, "_NUM_WEIGHTED", 40_000)

    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("obs", dist.Normal(w[..., 0], 1.0), obs=y)

    found = weighted_moments(Target(model, (torch.full((3,), 2.0),), by_entry))
    assert found["w[0]"] == pytest.approx((1.5, 0.5), abs=0.02)
    assert found["w[1]"] == pytest.approx((0.0, 1.0), abs=0.03)


def test_references_by_quadrature_agree_with_what_is_known():
    """No data say anything of a mean that is zero; the local scale's prior is half-Cauchy where y is large."""
    horseshoe = TARGETS["horseshoe"]().reference()
    assert horseshoe["theta[0]"][0] == pytest.approx(0.0)
    assert 9.5 < horseshoe["theta[9]"][0] < 10
    schools = TARGETS["centred eight schools"]().reference()
    assert schools["mu[0]"] == pytest.approx((4.4, 3.3), abs=0.1)  # as of posteriordb's draws
    assert schools["theta[0]"] == pytest.approx((6.2, 5.6), abs=0.1)
    assert TARGETS["heavy tails"]().reference()["x[2]"] == (0.0, pytest.approx(math.sqrt(5 / 3)))


@pytest.mark.slow
def test_a_short_run_on_a_funnel_is_wrong_or_warned(monkeypatch):
    monkeypatch.setattr(hard_targets, "NUM_WARMUP", 5)
    monkeypatch.setattr(hard_targets, "THINNING", 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        entry = hard_targets.run("funnel", "SGLD", 0, num_draws=50)
    assert entry["verdict"] in ("warned", "silently wrong")
    assert entry["sd_ratio"][0] == "v"
    assert len(hard_targets.cells(entry)) == len(hard_targets.HEADER)


def test_verdicts_are_counted_by_kernel():
    entries = [{"kernel": "SGLD", "verdict": "right"}, {"kernel": "SGLD", "verdict": "warned"}]
    entries += [{"kernel": "SGHMC", "verdict": "silently wrong"}]
    text = hard_targets.counts(entries)
    assert "| SGLD | 1 | 1 | 0 |" in text
    assert "| SGHMC | 0 | 0 | 1 |" in text
    lost = {
        "target": "funnel",
        "kernel": "SGLD",
        "seconds": 1.0,
        "warnings": ["DivergenceError: x"],
        "verdict": "warned",
    }
    assert hard_targets.cells(lost) == ["funnel", "SGLD", "-", "1", "-", "-", "DivergenceError", "warned"]


def test_a_resumed_benchmark_adds_what_is_not_there(monkeypatch, tmp_path, capsys):
    def run(name, kernel, seed, num_draws):
        entry = {"target": name, "kernel": kernel, "seed": seed, "seconds": 1.0, "warnings": [], "verdict": "right"}
        return entry | {"step_size": 0.1, "mean_error": ("v", 0.0), "sd_ratio": ("v", 1.0)}

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(hard_targets, "run", run)
    for kernels in (["SGLD"], ["SGLD", "SGHMC"]):
        monkeypatch.setattr("sys.argv", ["hard_targets", "--resume", "--only", "funnel", "--kernels", *kernels])
        hard_targets.main()
    assert [entry["kernel"] for entry in common.read_json("hard_targets")] == ["SGLD", "SGHMC"]
    assert "| SGLD | 1 | 0 | 0 |" in capsys.readouterr().out
