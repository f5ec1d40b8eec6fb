# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Predictions of the regressor against the same from its posterior by hand; units, shapes, weights, refusals."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

import pyro_apd as apd
from pyro_apd.sklearn import BNNRegressor
from tests.sklearn.conftest import SHORT, fitted


def moments(regressor, table):
    """Means and standard deviations of each network, in the targets' unit, ``(S, N)``."""
    x = torch.as_tensor(regressor._x_scaling.apply(table.to_numpy()))
    draws = regressor.posterior_.get_samples(regressor.num_networks, seed=regressor._draws_seed)
    found = apd.outputs(regressor.model_, draws, x)
    scale, mean = regressor._y_scaling.scale[0], regressor._y_scaling.mean[0]
    return mean + scale * found.mean_SN.numpy(), scale * found.variance_SN.sqrt().numpy()


@pytest.mark.slow
def test_predictions_are_those_of_the_posterior(regressor, table):
    mean_SN, sd_SN = moments(regressor, table)
    mean, sd, interval, quantiles = regressor.predict(table, True, return_interval=0.8, return_quantiles=[0.5, 0.99])
    assert_allclose(regressor.predict(table), mean)
    assert_allclose(mean, mean_SN.mean(0))
    assert_allclose(sd, np.sqrt(mean_SN.var(0) + (sd_SN**2).mean(0)))
    assert interval.shape == quantiles.shape == (len(table), 2)
    edges = np.concatenate([interval, quantiles], axis=1)
    for level, edge in zip([0.1, 0.9, 0.5, 0.99], edges.T, strict=True):
        share = torch.special.ndtr(torch.as_tensor((edge - mean_SN) / sd_SN)).mean(0)
        assert_allclose(share, level, atol=1e-9)
    uncertainty = regressor.predict_uncertainty(table)
    assert_allclose(uncertainty["epistemic_std"], mean_SN.std(0))
    assert_allclose(uncertainty["std"] ** 2, uncertainty["epistemic_std"] ** 2 + uncertainty["aleatoric_std"] ** 2)
    assert_allclose(uncertainty["std"], sd)


@pytest.mark.slow
def test_it_learns_in_the_unit_of_the_targets(regressor, table, target):
    assert regressor.score(table, target) > 0.9
    samples = regressor.sample_y(table, 500)
    assert samples.shape == (len(table), 500)
    mean, sd = regressor.predict(table, return_std=True)
    assert_allclose(samples.mean(1), mean, atol=4 * sd.max() / np.sqrt(20))
    assert_allclose(samples.std(1).mean(), sd.mean(), rtol=0.2)
    assert_allclose(regressor.sample_y(table, 3, random_state=5), regressor.sample_y(table, 3, random_state=5))


@pytest.mark.slow
def test_several_targets_with_noise_by_input(by_input, table, target):
    mean, sd, interval = by_input.predict(table, return_std=True, return_interval=0.5)
    assert mean.shape == sd.shape == (len(table), 2)
    assert interval.shape == (len(table), 2, 2)
    assert by_input.score(table, np.stack([target, -target], 1)) > 0.8
    assert by_input.sample_y(table, 4).shape == (len(table), 2, 4)
    assert len(np.unique(by_input.predict_uncertainty(table)["aleatoric_std"])) > 10
    assert not hasattr(by_input, "distilled_")
    assert by_input.posterior_["net.0.weight"].shape == (100, 8, 3)


@pytest.mark.slow
def test_rows_are_predicted_one_by_one_and_in_blocks(regressor, table, monkeypatch):
    whole = regressor.predict(table, return_interval=0.9)
    monkeypatch.setattr("pyro_apd.sklearn.base._BLOCK", 7)
    for one, other in zip(whole, regressor.predict(table, return_interval=0.9), strict=True):
        assert_allclose(one, other)
    assert regressor.sample_y(table, 3).shape == (len(table), 3)


@pytest.mark.slow
def test_integer_weights_are_repeated_rows(table, target):
    """With the noise of the same steps the chains stay together, but for rounding."""
    weights = np.arange(len(table)) % 3
    few = SHORT | {"num_samples": 3, "warmup_steps": 2}
    weighted = fitted(BNNRegressor(**few), table, target, weights, distil=False)
    twice = table.loc[table.index.repeat(weights)], np.repeat(target, weights)
    repeated = fitted(BNNRegressor(**few), *twice, distil=False)
    assert_allclose(weighted.predict(table), repeated.predict(table), rtol=1e-6)
    plain = fitted(BNNRegressor(**few), table, target, distil=False)
    assert np.abs(plain.predict(table) - weighted.predict(table)).max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"return_interval": 90}, "return_interval=90 must be .*0.9 is the interval that holds nine of ten"),
        ({"return_quantiles": [0.5, 1.0]}, "return_quantiles=1.0 must be"),
        ({"return_quantiles": 0.5}, r"return_quantiles=0.5 must be a list of levels; write \[0.5\]"),
    ],
)
def test_bad_levels(arguments, match):
    with pytest.raises(ValueError, match=match):
        BNNRegressor().predict(np.zeros((1, 1)), **arguments)


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"noise": "loud"}, "noise='loud' must be one of 'constant', 'by_input'"),
        ({"activation": "step"}, "activation='step' must be one of 'tanh'"),
        ({"sampler": "nuts"}, "sampler='nuts' must be one of 'auto', 'sgld'"),
        ({"hidden_layer_sizes": (8, 0)}, "hidden_layer_sizes=0 must be a positive integer.*two layers"),
        ({"hidden_layer_sizes": 2.5}, "hidden_layer_sizes=2.5 must be a tuple"),
        ({"sampler": "auto", "step_size": 0.1}, "step_size=0.1 belongs to a sampler.*Choose it too"),
        ({"batch_size": 0}, "batch_size=0 must be a positive integer"),
        ({"num_networks": 0}, "num_networks=0 must be"),
        ({"progress": "yes"}, "progress='yes' must be True or False"),
    ],
)
def test_bad_parameters(parameters, match, table, target):
    with pytest.raises(ValueError, match=match):
        BNNRegressor(**SHORT | parameters).fit(table, target)
