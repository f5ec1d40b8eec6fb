# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Moments by the paper's formulas, and a Gaussian posterior."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pyro_apd.baselines import swag
from pyro_apd.baselines.swag import SwagMoments
from tests.support.models import Conjugate


def test_moments_are_those_of_algorithm_1():
    iterates = torch.randn(9, 4, dtype=torch.float64) + 5
    moments = SwagMoments(3)
    for theta_D in iterates:
        moments.add(theta_D)
    found = moments.generator()
    values = iterates.numpy()
    means = np.cumsum(values, 0) / np.arange(1, 10)[:, None]
    deviations = (values - means)[-3:]
    assert_close(found.location.detach().numpy(), values.mean(0))
    assert_close(found.scale.detach().numpy(), np.sqrt((np.square(values).mean(0) - values.mean(0) ** 2) / 2))
    assert_close(found.deviations.detach().numpy(), deviations / np.sqrt(2 * 2))


def test_iterates_that_do_not_move_have_no_spread():
    moments = SwagMoments(2)
    for _ in range(5):
        moments.add(torch.full((3,), 1e4))
    found = moments.generator()
    assert (found.scale == 0).all()
    assert (found.deviations == 0).all()


@pytest.mark.slow
def test_a_gaussian_posterior():
    problem = Conjugate()
    settings = {"batch_size": 20, "num_steps": 100, "learning_rate": 0.1, "progress": False}
    settings |= {"rank": 3, "num_iterates": 40, "steps_per_iterate": 10}
    posterior = swag(problem.full, problem.x, problem.y, seed=0, **settings)
    draws = posterior.get_samples(500, seed=0)["w"]
    assert (draws.mean(0) - problem.mean).abs().max() < 0.05
    assert (draws.std(0) > 1e-3).all()
    assert posterior.generator.rank == 3
    assert posterior.frozen.read == {}
    again = swag(problem.full, problem.x, problem.y, seed=0, **settings)
    assert torch.equal(posterior.get_samples(5, seed=0)["w"], again.get_samples(5, seed=0)["w"])


@pytest.mark.parametrize("settings", [{"rank": 1}, {"rank": 5, "num_iterates": 4}])
def test_ranks_out_of_range(settings):
    problem = Conjugate()
    with pytest.raises(ValueError, match=r"rank.*at least 2.*num_iterates"):
        swag(problem.full, problem.x, problem.y, **settings)
