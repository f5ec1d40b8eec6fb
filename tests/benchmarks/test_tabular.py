# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""``benchmarks.tabular``: the model, its metrics, the deep ensemble, what is stored, and absent peers."""

import json
import math
import sys

import pyro
import pytest
import torch
from torch.nn.functional import softplus

from benchmarks import tabular, tabular_cases, tabular_ensemble


def line(num_classes=0, num_rows=60):
    x = torch.linspace(-2, 2, num_rows).unsqueeze(1)
    y = (x[:, 0] > 0).long() if num_classes else 3 * x[:, 0] + 5
    table = tabular_cases.Table("line", x[::2], y[::2], x[1::2], y[1::2], num_classes)
    return tabular_cases.standardised(table)


def test_rows_are_standardised_by_the_training_rows():
    x, x_test = torch.tensor([[1.0, 7.0], [3.0, 7.0]]), torch.tensor([[5.0, 8.0]])
    table = tabular_cases.Table("two rows", x, torch.tensor([0.0, 20.0]), x_test, torch.tensor([40.0]))
    found = tabular_cases.standardised(table)
    assert found.x.tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    assert found.x_test.tolist() == [[3.0, 1.0]]
    assert found.y_test.tolist() == [3.0]


def test_validation_rows_are_training_rows():
    table = line()
    inner = table.inner(0)
    assert len(inner.x_test) == round(0.15 * len(table.x))
    assert sorted(torch.cat([inner.x, inner.x_test])[:, 0].tolist()) == sorted(table.x[:, 0].tolist())
    assert inner.x_test.tolist() != table.inner(1).x_test.tolist()


def test_the_log_density_of_noise_by_input():
    table = line()
    model = tabular_cases.make_model(table, (3,), prior_scale=0.7)
    trace = pyro.poutine.trace(model).get_trace(table.x, table.y)
    outputs = trace.nodes["_RETURN"]["value"]
    scale = softplus(outputs[:, 1]) + 1e-6
    expected = torch.distributions.Normal(outputs[:, 0], scale).log_prob(table.y).sum()
    assert float(trace.log_prob_sum(lambda name, site: name == "obs")) == pytest.approx(float(expected), rel=1e-5)
    assert all(bool((prior.base_dist.scale == 0.7).all()) for prior in model.priors.values())


def test_outputs_of_draws_are_those_of_the_model():
    table = line(2)
    model = tabular_cases.make_model(table, (3,))
    draws = {site: prior.sample((2,)) for site, prior in model.priors.items()}
    outputs = tabular_cases.network_outputs(model, draws, table.x_test)
    second = pyro.poutine.condition(model, {site: value[1] for site, value in draws.items()})(table.x_test)
    assert torch.allclose(outputs[1], second, atol=1e-6)


def test_metrics_are_of_the_mixture_in_the_unit_of_the_targets():
    table = tabular_cases.Table(
        "one row", torch.zeros(1, 1), torch.zeros(1), torch.zeros(1, 1), torch.ones(1), unit=2.0
    )
    raw = math.log(math.expm1(1.0))  # a scale of one
    outputs = torch.tensor([[[0.0, raw]], [[1.0, raw]]])
    found = tabular_cases.metrics(table, outputs)
    density = (math.exp(-0.5) + 1) / 2 / math.sqrt(2 * math.pi) / 2
    assert found["log_likelihood"] == pytest.approx(math.log(density), abs=1e-5)
    assert found["rmse"] == pytest.approx(2.0 * 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [0, 2])
def test_a_deep_ensemble_learns_a_line(monkeypatch, num_classes):
    monkeypatch.setattr(tabular_ensemble, "MAX_EPOCHS", 200)
    table = line(num_classes)
    outputs = tabular_ensemble.ensemble_outputs(table, (8,), 0, seconds=0.0)
    assert outputs.shape == (5, len(table.x_test), 2)
    assert not torch.allclose(outputs[0], outputs[1])
    found = tabular_cases.metrics(table, outputs)
    assert found["log_likelihood"] > (-0.2 if num_classes else -1.0 - math.log(table.unit) + 1.0)
    again = tabular_ensemble.ensemble_outputs(table, (8,), 0, seconds=0.0)
    assert torch.equal(outputs, again)


@pytest.mark.slow
def test_a_quick_run_prints_and_stores_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv(tabular.PEERS, raising=False)
    monkeypatch.setattr(tabular, "RESULTS", tmp_path)
    tabular.main(["--quick", "--sets", "wine"])
    printed = capsys.readouterr().out
    assert "BDE: skipped" in printed
    assert "| wine | pyro_apd |" in printed
    assert "| wine | deep ensemble |" in printed
    assert not list(tmp_path.iterdir())


def test_stored_splits_are_kept_and_not_measured_again(monkeypatch, tmp_path, capsys):
    stored = {
        name: {"log_likelihood": -0.1, "accuracy": 1.0, "ece": 0.1, "cpu_seconds": 1.0} for name in tabular.METHODS
    }
    others = {"digits/0": stored, "wine/0": stored, "wine/1": {"BDE": stored["BDE"]}}
    path = tmp_path / "tabular.json"
    path.write_text(json.dumps(others))
    monkeypatch.setattr(tabular, "write_json", lambda name, content: path.write_text(json.dumps(content)))
    monkeypatch.setattr(tabular, "RESULTS", tmp_path)
    monkeypatch.setattr(tabular, "load", lambda name, split: line(3))
    monkeypatch.setattr(tabular, "ours", lambda *_: stored["pyro_apd"] | {"log_likelihood": -0.3})
    monkeypatch.setattr(tabular, "ensemble", lambda *_: stored["deep ensemble"])
    monkeypatch.delenv(tabular.PEERS, raising=False)
    tabular.main(["--sets", "wine", "--splits", "0", "1"])
    written = json.loads(path.read_text())
    assert written["digits/0"] == stored
    assert written["wine/0"] == stored
    assert written["wine/1"]["pyro_apd"]["log_likelihood"] == -0.3
    assert "| wine | pyro_apd | -0.200 ± 0.100 | -0.100 ± 0.100 |" in capsys.readouterr().out


def test_a_peer_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"BDE failed: [\s\S]*ModuleNotFoundError"):
        tabular.bde(line(), 0, 0.01, sys.executable)
