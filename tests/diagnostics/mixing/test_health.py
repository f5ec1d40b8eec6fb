# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import math

import numpy as np
import pytest
import torch

from pyro_apd.diagnostics import convergence
from pyro_apd.diagnostics.arviz_export import compat
from pyro_apd.diagnostics.comparison.evaluation import Inputs
from pyro_apd.diagnostics.mixing.health import chain_health, layer_health
from pyro_apd.predictive.draws import read_chains
from pyro_apd.predictive.predictive import outputs


@pytest.fixture
def inputs(case):
    return Inputs((case.x,), {}, None, None, {})


def health_of(case, inputs, **options):
    chain = read_chains(case.chain(**options), group_by_chain=True)
    stats = {"potential": np.random.default_rng(0).normal(size=(chain.num_chains, chain.num_draws))}
    return chain, chain_health(chain, stats, case.model, inputs)


def test_scalars_are_few_and_named(case, inputs):
    _, health = health_of(case, inputs)
    assert [row.group for row in health] == ["function value"] * 6 + ["weight"] * 4 + ["kernel"]
    assert all(row.name.endswith(f"at input {i}") for row, i in zip(health, (12, 37, 62, 87, 112, 137), strict=False))
    assert [row.name for row in health[6:]] == [
        *("hidden.weight[1, 1]", "hidden.bias[2]", "out.weight[1, 0]", "out.weight[2, 3]"),
        "potential",
    ]


def test_figures_are_those_of_arviz(case, inputs):
    chain, health = health_of(case, inputs)
    arviz = compat.import_arviz()
    probs = outputs(case.model, chain.pooled(range(100)), case.x).probs_SNK[:, 12]
    values = probs[:, probs.mean(0).argmax()].reshape(4, 100).double().numpy()
    assert health[0].rhat == pytest.approx(float(arviz.rhat(values)), abs=1e-3)
    assert health[0].ess_bulk == pytest.approx(float(arviz.ess(values)), rel=0.02)
    weight = chain.values["hidden.weight"][:, :, 1, 1].double().numpy()
    row = next(row for row in health if row.name == "hidden.weight[1, 1]")
    assert row.rhat == pytest.approx(float(arviz.rhat(weight)), abs=1e-6)
    assert row.ess_tail == pytest.approx(float(arviz.ess(weight, method="tail")), rel=1e-6)


def test_mixed_and_unmixed_chains(case, inputs):
    _, mixed = health_of(case, inputs)
    _, stuck = health_of(case, inputs, sd=0.02, spread=1.0)
    assert max(row.rhat for row in mixed) < 1.1
    assert min(row.rhat for row in stuck if row.group == "function value") > 1.3
    assert max(row.ess_bulk for row in stuck if row.group == "function value") < 30


def test_one_chain_has_no_rhat_and_a_still_one_nothing(case, inputs):
    _, one = health_of(case, inputs, num_chains=1)
    assert all(math.isnan(row.rhat) and row.ess_bulk > 10 for row in one)
    _, short = health_of(case, inputs, num_draws=3)
    assert all(math.isnan(row.ess_bulk) for row in short)


def test_without_inputs_there_are_weights(case):
    chain = read_chains({"scale": torch.rand(4, 50), "w": torch.randn(4, 50, 2, 2)}, group_by_chain=True)
    health = chain_health(chain, {})
    assert {row.group for row in health} == {"weight"}
    assert health[0].name == "scale"
    assert len({row.name for row in health}) == 4


def test_long_chains_are_thinned(case, inputs):
    _, health = health_of(case, inputs, num_chains=2, num_draws=1500)
    assert max(row.ess_bulk for row in health) < 1500


def test_layers_sum_up_their_weights(case):
    chain = read_chains(case.chain(), group_by_chain=True)
    layers = layer_health(chain)
    assert [(row.layer, row.num_weights) for row in layers] == [("hidden", 12), ("out", 15)]
    rhat = torch.cat([value["rhat"].flatten() for value in list(convergence(chain.values).values())[:2]])
    assert layers[0].rhat_50 in rhat.tolist()
    assert layers[0].rhat_50 <= layers[0].rhat_95 <= float(rhat.max())
    assert layers[0].ess_5 <= layers[0].ess_50
    few = layer_health(chain, max_weights=6)
    assert sum(row.num_weights for row in few) <= 6
    stuck = layer_health(read_chains(case.chain(sd=0.02, spread=1.0), group_by_chain=True))
    assert min(row.rhat_50 for row in stuck) > 1.5
    assert math.isnan(layer_health(read_chains(case.chain(num_chains=1), group_by_chain=True))[0].rhat_50)
