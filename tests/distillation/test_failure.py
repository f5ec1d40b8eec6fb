# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What a generator is not accepted for."""

import math

import pytest
import torch
from torch import nn

from pyro_apd.distillation import DistillationError, DistillationWarning, distill, failure, offline, setup
from pyro_apd.distillation.calibration import Calibration
from pyro_apd.distillation.failure import Quality, find_disagreement, find_failures, find_shortage
from pyro_apd.models.bnn import BNN


@pytest.mark.parametrize(
    ("metrics", "word"),
    [
        ({"distance": 1.0, "spread_ratio": 0.3}, "collapsed: its spread between draws is 0.30 times"),
        ({"distance": 1.0, "spread_ratio": 1.0, "mi_ratio": 0.1}, "collapsed: its mutual information is 0.10 times"),
        ({"distance": 1.0, "spread_ratio": 9.0}, "diverged"),
        ({"distance": 1.0, "spread_ratio": math.nan}, "diverged"),
    ],
)
def test_failures_are_found(metrics, word):
    (failure,) = find_failures(metrics)
    assert word in failure


def test_good_metrics_are_no_failure():
    assert find_failures({"distance": 0.1, "spread_ratio": 0.9, "mi_ratio": 1.2}) == []


def calibrated(excess):
    return Calibration(1.0, 1.0, {"rows": math.log(excess), "near": 2.0, "far": -2.0})


def shortage(metrics, calibration, default=None):
    """Of a generator in fewer bytes than the default, which by default is good."""
    good = Quality({"distance": 0.01}, calibrated(1.0))
    return find_shortage(0.7, 76_672, 5.1, Quality(metrics, calibration), lambda: default or good)


def test_a_budget_is_too_small_by_disagreement_on_the_data_or_by_distance():
    found = shortage({"distance": 1.7}, calibrated(3.85))
    assert found.reason == (
        "byte_budget=0.7 is too small for this posterior: on the data, draws disagree 3.85 times as much as the "
        "chain's, and the distance to held-out draws is 1.7 of their spread; the default, without a budget, takes "
        "about 76,672 bytes (5.1 networks)"
    )
    assert found.advice == "more bytes"
    assert "3.85" in shortage({"distance": 0.01}, calibrated(3.85)).reason
    assert "disagree" not in shortage({"distance": 1.7}, None).reason


@pytest.mark.parametrize(
    ("distance", "excess", "advice"),
    [(1.7, 3.85, "more draws"), (1.6, 3.6, "more draws"), (1.7, 2.0, "more bytes"), (0.9, 3.85, "more bytes")],
)
def test_more_bytes_do_not_help_where_the_default_is_no_better(distance, excess, advice):
    default = Quality({"distance": distance}, calibrated(excess))
    found = shortage({"distance": 1.7}, calibrated(3.85), default)
    assert found.advice == advice
    assert ("too few draws" in found.reason) == (advice == "more draws")


def test_a_budget_that_suffices_is_accepted():
    def never():
        raise AssertionError("The default was fitted.")

    for metrics, calibration in (
        ({"distance": 0.02}, calibrated(1.1)),
        ({"distance": 0.02}, None),
        ({}, calibrated(0.8)),
    ):
        assert find_shortage(2.0, 76_672, 5.1, Quality(metrics, calibration), never) is None


@pytest.mark.parametrize(("ratio", "is_accepted"), [(0.5, False), (0.8, True), (1.0, True), (1.3, True), (1.5, False)])
def test_disagreement_on_the_data_is_to_be_the_chains(ratio, is_accepted):
    found = find_disagreement(calibrated(ratio))
    assert (found is None) == is_accepted
    assert is_accepted or f"draws disagree {ratio:.2f} times as much as the chain's, where 0.74 to 1.35" in found
    assert find_disagreement(None) is None


@pytest.fixture
def chain():
    """A model with three classes, its data and draws."""
    net = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3))
    model = BNN(net, prior_scale="fan_in")
    generator = torch.Generator().manual_seed(2)
    data = torch.randn(40, 20, generator=generator), torch.arange(40) % 3
    draws = {
        name: 0.1 * torch.randn(50, *prior.batch_shape, *prior.event_shape, generator=generator).cumsum(0)
        for name, prior in model.priors.items()
    }
    return {"source": draws, "model": model, "data": data, "num_steps": 0, "seed": 0, "progress": False}


def test_only_a_budget_below_the_default_is_called_too_small(chain, monkeypatch):
    monkeypatch.setattr(failure, "ACCEPTED_DISTANCE", 0.0)
    monkeypatch.setattr(failure, "_BETTER", math.inf)
    enough = distill(**chain).num_bytes
    distill(**chain, byte_budget=2 * enough)  # warnings are errors
    with pytest.warns(DistillationWarning, match=r"not good: byte_budget=\d+ is too small .* Use more bytes\."):
        posterior = distill(**chain, byte_budget=enough // 2)
    (text,) = posterior.metadata["warnings"]
    assert "is too small for this posterior" in text
    assert text in repr(posterior)
    with pytest.raises(DistillationError, match=r"Distillation failed: byte_budget=.* is too small for this posterior"):
        distill(**chain, byte_budget=enough // 2, strict=True)


def test_of_few_draws_more_are_asked_for(chain, monkeypatch):
    monkeypatch.setattr(failure, "ACCEPTED_DISTANCE", 0.0)
    monkeypatch.setattr(failure, "_BETTER", 0.0)
    enough = distill(**chain).num_bytes
    with pytest.warns(DistillationWarning, match=r"too few draws .* and is no better\. .* Use more draws\."):
        distill(**chain, byte_budget=enough // 2)


def test_a_default_that_disagrees_too_much_on_the_data_is_trained_or_reported(chain, monkeypatch):
    monkeypatch.setattr(failure, "ACCEPTED_DISAGREEMENT", 1.0)
    with pytest.warns(DistillationWarning, match=r"on the data, draws disagree .* Use more draws, more steps"):
        distill(**chain)
    at_start = failure.find_disagreement
    monkeypatch.setattr(setup, "_TINY_STEPS", 2)
    monkeypatch.setattr(offline, "find_disagreement", lambda calibration: seen.append(calibration))
    seen = []
    trained = distill(**{**chain, "num_steps": None})
    assert trained.metadata["num_steps"] == trained.metadata["best_step"] == 2
    # What is judged, and kept, is the state after training.
    assert [calibration.to_json() for calibration in seen] == [trained.metadata["calibration"]]
    assert trained.metadata["calibration"]["residuals"] != distill(**chain).metadata["calibration"]["residuals"]
    assert "times as much" in at_start(seen[0])
