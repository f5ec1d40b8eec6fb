# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""SGLD against a posterior that can be written down: the mean, the covariance, and its own known error."""

import pytest
import torch

from pyro_apd.kernels import SGLD
from tests.support.exactness import assert_gaussian, draws_of_chains
from tests.support.models import Conjugate

PROBLEM = Conjugate()
DATA = (PROBLEM.x, PROBLEM.y)
STEP_SIZE = 8e-4


class Batches:
    """The rows in a new order each time: as a DataLoader, whose own work would be most of these tests."""

    def __len__(self):
        return 4

    def __iter__(self):
        return iter([(PROBLEM.x[rows], PROBLEM.y[rows]) for rows in torch.randperm(200).reshape(4, 50)])


STYLES = {
    "full batch": (PROBLEM.full, DATA, {}),
    "(i) subsampling plate": (PROBLEM.subsampling, DATA, {}),
    "(ii) batch_size": (PROBLEM.full, DATA, {"batch_size": 50}),
    "(ii) without a plate": (PROBLEM.without_plate, DATA, {"batch_size": 50}),
    "(iii) batches": (PROBLEM.full, (Batches(),), {"num_data": 200, "prefetch": 0}),
}


def draws_of(model, args, step_size=STEP_SIZE, num_chains=512, **settings):
    return draws_of_chains(SGLD(model, step_size, seed=2, compile=False, **settings), args, num_chains=num_chains)


def discretised(covariance, step_size, temperature=1.0):
    """SGLD's own stationary covariance: a variance of 1 / lambda is 1 / (1 - epsilon lambda / 4) times too large."""
    values, vectors = torch.linalg.eigh(covariance / temperature)
    return temperature * (vectors * values / (1 - step_size / values / 4)) @ vectors.T


@pytest.mark.slow
@pytest.mark.parametrize(
    ("style", "temperature"), [*((style, 1.0) for style in STYLES), ("full batch", 0.25), ("(ii) batch_size", 0.25)]
)
def test_exact_gaussian_posterior(style, temperature):
    model, args, settings = STYLES[style]
    num_chains = {"full batch": 512, "(iii) batches": 100}.get(style, 128)
    draws = draws_of(model, args, num_chains=num_chains, temperature=temperature, **settings)
    exact = Conjugate(temperature=temperature)
    # Mini-batches in epochs add about 1 % at T = 1: their noise does not fall with the temperature.
    excess = 0.0 if style == "full batch" else 0.02 / temperature
    assert_gaussian(draws, exact.mean, discretised(exact.covariance, STEP_SIZE, temperature), excess=excess)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["full batch", "(ii) batch_size"])
def test_three_point_noise_has_the_same_covariance(style):
    model, args, settings = STYLES[style]
    draws = draws_of(model, args, noise="three-point", thinning=20, **settings)
    excess = 0.0 if style == "full batch" else 0.02
    assert_gaussian(draws, PROBLEM.mean, discretised(PROBLEM.covariance, STEP_SIZE), excess=excess)


def test_three_point_noise_needs_many_steps_per_draw():
    with pytest.raises(ValueError, match="thinning=19"):
        SGLD(PROBLEM.full, STEP_SIZE, noise="three-point", thinning=19)
    assert SGLD(PROBLEM.full, STEP_SIZE, noise="three-point", thinning=20).noise == "three-point"


@pytest.mark.slow
def test_discretisation_bias_is_the_one_stated():
    step_size = 2.0 / PROBLEM.largest_curvature
    expected = discretised(PROBLEM.covariance, step_size)
    assert_gaussian(draws_of(PROBLEM.full, DATA, step_size=step_size), PROBLEM.mean, expected)
    precision = torch.linalg.inv(PROBLEM.covariance)
    assert torch.linalg.eigvals(expected @ precision).real.max() > 1.9


@pytest.mark.slow
def test_temperature_zero_descends_to_the_mode():
    draws = draws_of(PROBLEM.full, DATA, num_chains=8, temperature=0.0)
    torch.testing.assert_close(draws[:, -1].float(), PROBLEM.mean.expand(8, 3), rtol=1e-3, atol=1e-4)
