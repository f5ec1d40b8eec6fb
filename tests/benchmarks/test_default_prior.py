# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""``benchmarks.default_prior``: the candidates, the rule that chooses, and a quick run."""

import pytest
from torch import nn

import pyro_apd as apd
from benchmarks import default_prior

SETS = ("a", "b", "c", "d", "e", "f", "g")


def cases(gains):
    """The present default at 0, one candidate better by so much on each set, the others far behind."""
    found = {}
    for name, gain in zip(SETS, gains, strict=True):
        values = dict.fromkeys(default_prior.CANDIDATES, -9.0)
        found[f"{name}/50 relu"] = values | {default_prior.PRESENT: 0.0, "fan_in": gain}
    return found


def test_candidates_by_layer():
    net = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2))
    sds = {}
    for name, spec in default_prior.CANDIDATES.items():
        priors = apd.BNN(net, prior_scale=spec).priors
        sds[name] = [round(float(prior.base_dist.scale.flatten()[0]), 3) for prior in priors.values()]
    assert sds["1.0"] == [1, 1, 1, 1]
    assert sds["fan_in"] == [0.5, 1, 0.333, 1]
    assert sds["√2 fan_in"] == [0.707, 1, 0.471, 1]
    assert sds["2 fan_in"] == [1, 1, 0.667, 1]
    assert sds["1.0, then fan_in"] == [1, 1, 0.333, 1]


@pytest.mark.parametrize(
    ("gains", "chosen"),
    [
        ([0.1] * 7, "fan_in"),
        ([0.1] * 6 + [-0.04], "fan_in"),
        ([0.1] * 6 + [-0.06], "1.0"),
        ([0.1] * 5 + [-0.01] * 2, "1.0"),
        ([-0.1] * 7, "1.0"),
    ],
)
def test_the_rule(gains, chosen):
    assert default_prior.decision(default_prior.summary(cases(gains))) == chosen


def test_means_over_splits_that_are_complete():
    results = {f"wine/{s}/50 relu/{c}": {"log_likelihood": -s} for s in (0, 1) for c in default_prior.CANDIDATES}
    results["wine/2/50 relu/1.0"] = {"log_likelihood": -9.0}
    assert default_prior.by_case(results)["wine/50 relu"]["1.0"] == -0.5
    assert default_prior.ranks([0.1, 0.3, 0.3]) == [3, 1, 1]


@pytest.mark.slow
def test_a_quick_run_prints_and_stores_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(default_prior, "RESULTS", tmp_path)
    default_prior.main(["--quick", "--sets", "wine", "--networks", "50 relu"])
    assert "The rule chooses" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
