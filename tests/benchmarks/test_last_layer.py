# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The benchmark of last layers: its metrics, and every method on a few made-up queries."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from benchmarks import last_layer, last_layer_methods
from benchmarks.last_layer_data import Queries, SentenceEncoder


@pytest.fixture
def queries(monkeypatch):
    """Three clusters, and queries far from all."""
    monkeypatch.setattr(last_layer_methods, "NUM_CLASSES", 3)
    monkeypatch.setattr(last_layer_methods, "_STEPS", 30)
    for name in ("SCALES", "ENSEMBLE_SCALES", "CHAIN_SCALES"):
        monkeypatch.setattr(last_layer_methods, name, (0.3, 1.0))
    monkeypatch.setattr(last_layer_methods, "_DRAWS", 20)
    monkeypatch.setattr(last_layer_methods, "_WARMUP", 5)
    settings = {"batch_size": 20, "thinning": 2, "warm_start": 20}
    monkeypatch.setattr(last_layer_methods, "_CHAIN", settings)
    centre_KF = 2 * torch.eye(3, 5)

    def split(count, known=True):
        y_N = torch.arange(count) % 3
        x_NF = torch.randn(count, 5) * 0.5 + (centre_KF[y_N] if known else 2.0)
        return Queries([""] * count, x_NF, y_N if known else torch.full((count,), -1))

    return {
        "train": split(60),
        "val": split(30),
        "test": split(30),
        "oos_val": split(20, False),
        "oos_test": split(20, False),
    }


def test_metrics():
    inside, outside = torch.arange(100.0), torch.tensor([98.0, 10.5, 200.0, 94.9])
    assert last_layer.recall(inside, outside) == 0.75
    assert last_layer.auroc(inside, outside) == pytest.approx((98.5 + 11 + 100 + 95) / 400)
    probs_NK = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    assert last_layer.nll(probs_NK, torch.tensor([0, 0])) == pytest.approx(
        -(0.9 * torch.ones(1)).log().item() / 2 + 0.4581, abs=1e-3
    )
    assert_close(last_layer.tempered(probs_NK, 1.0), probs_NK)
    assert_close(last_layer.tempered(probs_NK, 0.5)[0], torch.tensor([0.81, 0.01]) / 0.82)


@pytest.mark.parametrize("method", ["maximum", "laplace", "ensemble", "mc_dropout"])
def test_methods(queries, method):
    found = last_layer.by_validation(getattr(last_layer_methods, method)(queries["train"], 0), queries)
    assert found["accuracy"] > 0.8
    assert 0 < found["NLL"] < 1
    assert found["setting"]


@pytest.mark.slow
def test_the_chain_and_its_generator(queries, tmp_path, monkeypatch, capsys):
    net = nn.Sequential(nn.Identity(), nn.Linear(5, 3))
    monkeypatch.setattr(last_layer, "NUM_CLASSES", 3)
    monkeypatch.setattr(last_layer, "BUDGET", 200.0)
    monkeypatch.setattr(last_layer, "CACHE", tmp_path)
    monkeypatch.setattr(last_layer, "load_encoder", lambda: (None, net[0]))
    found = last_layer.run_chain(queries, 0, None)
    assert found["chain"]["accuracy"] > 0.8
    assert found["generator"]["networks"] > 0
    assert "prior 0.3" in capsys.readouterr().out
    table = last_layer.table({name: {"0": result} for name, result in found.items()})
    assert table.count("\n") == 3


def test_the_encoder_averages_tokens_that_are_there():
    class Tokens(nn.Module):
        def forward(self, input_ids, attention_mask):
            states = torch.stack([input_ids.float(), torch.ones_like(input_ids).float()], -1)
            return type("Output", (), {"last_hidden_state": states})()

    x_NF = SentenceEncoder(Tokens())(torch.tensor([[3, 5, 100]]), torch.tensor([[1, 1, 0]]))
    assert_close(x_NF, nn.functional.normalize(torch.tensor([[4.0, 1.0]])) * 2**0.5)
