# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Data are cut into blocks of rows where that makes no difference, and only there."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from pyro_apd.predictive import row_blocks
from pyro_apd.predictive.predictive import log_likelihood, outputs
from pyro_apd.predictive.row_blocks import plan_cut
from tests.support.models import Classifier

S, N = 9, 50


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(row_blocks, "_TILE_BYTES", 2048)
    monkeypatch.setattr(row_blocks, "_TILE_ROWS", 10)


def draws_of():
    generator = torch.Generator().manual_seed(0)
    sites = {"first.weight": (6, 4), "first.bias": (6,), "second.weight": (3, 6), "second.bias": (3,)}
    return {name: torch.randn(S, *shape, generator=generator) for name, shape in sites.items()}


def by_hand(draws, x):
    hidden = torch.relu(x @ draws["first.weight"].mT + draws["first.bias"].unsqueeze(1))
    return (hidden @ draws["second.weight"].mT + draws["second.bias"].unsqueeze(1)).softmax(-1)


X = torch.randn(N, 4, generator=torch.Generator().manual_seed(3))


def test_independent_rows_are_cut():
    net = Classifier()
    seen = []
    net.first.register_forward_hook(lambda *args: seen.append(len(args[1][0])))
    probs_SNK = outputs(net, draws_of(), X).probs_SNK
    assert_close(probs_SNK, by_hand(draws_of(), X))
    assert max(seen[-4:]) < N / 2
    assert sum(seen[-4:]) <= N


def test_observations_are_cut_along():
    net, y = Classifier(), torch.arange(N) % 3
    expected = by_hand(draws_of(), X).log()[:, torch.arange(N), y]
    assert_close(log_likelihood(net, draws_of(), X, y), expected)
    assert_close(log_likelihood(net, draws_of(), X, y=y), expected)


class Centred(Classifier):
    """Looks at all rows together."""

    def network(self, x):
        return super().network(x - x.mean(0))


class Sized(Classifier):
    """Knows how many rows there are."""

    def forward(self, x, y=None):
        logits = self.network(x)
        with pyro.plate("data", N):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)


@pytest.mark.parametrize(("kind", "inputs"), [(Centred, X - X.mean(0)), (Sized, X)])
def test_rows_that_depend_on_each_other_are_not(kind, inputs):
    net, seen = kind(), []
    net.first.register_forward_hook(lambda *args: seen.append(len(args[1][0])))
    assert_close(outputs(net, draws_of(), X).probs_SNK, by_hand(draws_of(), inputs))
    assert seen[-1] == N


def test_random_numbers_are_those_that_would_be_without(monkeypatch):
    states = []
    for size in (2048, 2**30):
        monkeypatch.setattr(row_blocks, "_TILE_BYTES", size)
        torch.manual_seed(0)
        outputs(Classifier(), draws_of(), X)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_events_are_cut_with_their_rows():
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(4, 2), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 1.0).to_event(1))

    w = torch.randn(S, 4, 2)
    assert_close(outputs(model, {"w": w}, X).mean_SN, (X @ w).flatten(1))


def test_plans(monkeypatch):
    monkeypatch.undo()
    x = torch.zeros(1000, 3)
    megabytes = 2**20
    cut = plan_cut(64 * megabytes, 100, None, (x, 3), {"y": torch.zeros(1000)})
    assert (cut.num_rows, cut.num_draws) == (1000, 1)
    assert cut.block_rows == 125
    args, kwargs = cut.of(slice(2, 5), (x, 3), {"y": torch.zeros(1000), "z": torch.zeros(7)})
    assert [args[0].shape[0], args[1], len(kwargs["y"]), len(kwargs["z"])] == [3, 3, 3, 7]
    assert sum(span.stop - span.start for span in cut.spans()) == 1000
    assert plan_cut(64 * megabytes, 100, 4, (x,), {}).num_draws == 4
    assert plan_cut(megabytes, 100, None, (x,), {}) is None
    assert plan_cut(64 * megabytes, 2, None, (x,), {}) is None
    assert plan_cut(64 * megabytes, 100, None, (3,), {}) is None
