# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Models written from integers; ``python -m benchmarks.model_fuzz`` tries 10,000."""

import random
from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine

import pyro_apd as apd
from benchmarks import model_fuzz
from benchmarks.model_fuzz_models import FAULTS, LIKELIHOODS, NETWORKS, STYLES, draw, model_source


# Most of what is planted is not refused yet.
@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 100, 25))
def test_each_model_is_right_or_refused(first):
    results = model_fuzz.fuzz(25, first)
    assert not model_fuzz.causes(results)
    assert {result.kind for result in results} == {"no fault", "kind 1", "kind 2", "kind 4"}


def with_outcome(outcome, styles=STYLES):
    """A model of which the package makes this now."""
    found = (model_fuzz.try_model(draw(seed)) for seed in range(100) if draw(seed).style in styles)
    return next(result.model for result in found if result.outcome == outcome)


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_another_gradient_is_noticed(monkeypatch, factor):
    model, right = with_outcome("right"), model_fuzz.mean_gradient
    monkeypatch.setattr(model_fuzz, "mean_gradient", lambda *args: factor * right(*args))
    result = model_fuzz.try_model(model)
    assert result.outcome == "silent difference"
    assert f"({model.seed})" in model_fuzz.causes([result])


def test_a_difference_in_one_latent_is_noticed():
    one, other = torch.ones(3), torch.full((2,), 1e3)
    wanted = {"small": one, "large": other}
    assert model_fuzz.difference({"small": 1.01 * one, "large": other}, wanted) == pytest.approx(0.01, rel=1e-3)
    assert model_fuzz.difference(wanted, {"large": other}) == float("inf")
    assert model_fuzz.difference(wanted, None) == float("inf")


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (apd.ModelError("Site 'obs' is wrong."), "false refusal"),
        (ValueError("x" * 2000), "other error"),
        (KeyError("obs"), "other error"),
    ],
)
def test_a_refusal_of_a_right_model_is_noticed(monkeypatch, error, outcome):
    def refuse(*args, **kwargs):
        raise error

    model = with_outcome("right")
    monkeypatch.setattr(model_fuzz, "build_potential", refuse)
    assert model_fuzz.try_model(model).outcome == outcome


@pytest.mark.parametrize(
    ("style", "in_plate", "outcome"),
    [
        ("full", "out", "false refusal"),
        ("tensors", "out", "refused rightly"),
        ("plate", "out", "false refusal"),
        ("plate", "in", "refused rightly"),
    ],
)
def test_a_fault_without_effect_must_run(monkeypatch, style, in_plate, outcome):
    """Of all rows, a model may compute what it likes."""

    def refuse(*args, **kwargs):
        raise apd.ModelError("Site 'obs' is no sum over rows.")

    def is_plain(model):
        return model.network in ("linear", "MLP") and model.plate == "len" and not model.may_be_refused

    monkeypatch.setattr(model_fuzz, "build_potential", refuse)
    fault = next(fault for fault in FAULTS if fault.name == "inputs centred by the batch")
    models = (draw(seed) for seed in range(1000))
    model = next(model for model in models if (model.style, model.in_plate) == (style, in_plate) and is_plain(model))
    assert model_fuzz.try_model(replace(model, fault=fault)).outcome == outcome


def test_all_parts_occur():
    models = [draw(seed) for seed in range(2500)]
    assert {model.fault.name for model in models if model.fault} == {fault.name for fault in FAULTS}
    assert {model.likelihood.name for model in models} >= {likelihood.name for likelihood in LIKELIHOODS}
    assert {model.network for model in models} == set(NETWORKS)
    assert {model.style for model in models} == set(STYLES)
    assert 0.4 < sum(model.fault is not None for model in models) / len(models) < 0.6


def density(model):
    """The log-density of the reference at a draw of its prior."""
    with model_fuzz.untouched():
        case = model_fuzz.Case(model)
        args, kwargs = case.call
        return float(poutine.trace(case.reference).get_trace(*args, **kwargs).log_prob_sum())


def test_the_reference_runs_in_plain_pyro():
    for model in (draw(seed) for seed in range(40)):
        assert np.isfinite(density(model)), model.seed


def test_models_are_reproducible_and_leave_no_trace():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    assert model_source(draw(7)) == model_source(draw(7))
    first = density(draw(7))
    pyro.set_rng_seed(1)
    assert density(draw(7)) == first
    pyro.set_rng_seed(0)
    assert model_fuzz.try_model(draw(7)) == model_fuzz.try_model(draw(7))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_show_prints_the_code(capsys):
    model_fuzz.show(3)
    shown = capsys.readouterr().out
    assert model_source(draw(3)) in shown
    assert "# seed 3; fault: " in shown


def test_failures_are_listed_and_end_with_an_error(monkeypatch, capsys):
    failure = model_fuzz.Result(draw(5), "false refusal", "ModelError: Plate of 12 rows")
    monkeypatch.setattr(model_fuzz, "fuzz", lambda *args, **kwargs: [failure])
    monkeypatch.setattr(model_fuzz, "write_json", lambda *args: None)
    monkeypatch.setattr("sys.argv", ["model_fuzz", "--models", "1"])
    with pytest.raises(SystemExit) as stop:
        model_fuzz.main()
    assert stop.value.code == 1
    assert "Plate of # rows" in capsys.readouterr().out
