# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Whatever a baseline gives, both Predictives take."""

from collections.abc import Mapping

import pyro.infer
import pytest
import torch

import pyro_apd as apd
from pyro_apd import baselines
from tests.support.models import Classifier

X = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
SITES = {"first.weight": (6, 4), "first.bias": (6,), "second.weight": (3, 6), "second.bias": (3,)}
SHORT = {"num_steps": 2, "seed": 0, "progress": False}


def chain():
    return {name: torch.randn(12, *shape) for name, shape in SITES.items()}


BASELINES = {
    "map_estimate": lambda model: baselines.map_estimate(model, X, Y, **SHORT),
    "deep_ensemble": lambda model: baselines.deep_ensemble(model, X, Y, num_networks=2, **SHORT),
    "mc_dropout": lambda model: baselines.mc_dropout(model, X, Y, **SHORT),
    "swag": lambda model: baselines.swag(model, X, Y, rank=2, num_iterates=3, steps_per_iterate=1, **SHORT),
    "low_rank": lambda model: baselines.low_rank(chain(), rank=2),
    "stored_draws": lambda model: baselines.stored_draws(chain(), 4),
}


@pytest.mark.parametrize("name", BASELINES)
def test_both_predictives_take_it(name):
    model = Classifier()
    before = torch.random.get_rng_state()
    posterior = BASELINES[name](model)
    if name not in ("low_rank", "stored_draws"):  # whose draws the test itself makes
        assert torch.equal(before, torch.random.get_rng_state()), "the global generator was touched"
    for predictive in (apd.Predictive, pyro.infer.Predictive):
        if isinstance(posterior, Mapping):
            predictions = predictive(model, posterior_samples=posterior)(X)["obs"]
        else:
            predictions = predictive(model, guide=posterior, num_samples=4)(X)["obs"]
        assert predictions.shape[1:] == (30,)
        assert set(predictions.unique().tolist()) <= {0, 1, 2}
    draws = posterior if isinstance(posterior, Mapping) else posterior.get_samples(4, seed=0)
    assert {site: tuple(value.shape[1:]) for site, value in draws.items()} == SITES
    assert all(value.isfinite().all() for value in draws.values())


@pytest.mark.parametrize("name", ["map_estimate", "deep_ensemble", "mc_dropout", "swag"])
def test_inference_mode_is_refused(name):
    with torch.inference_mode(), pytest.raises(ValueError, match=rf"{name} computes gradients"):
        BASELINES[name](Classifier())
