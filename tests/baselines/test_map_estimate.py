# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The maximum of a posterior that is known."""

import pytest
import torch
from torch.testing import assert_close

from pyro_apd.baselines import map_estimate
from pyro_apd.errors import ModelError
from tests.support.models import Conjugate, null


def test_the_mode_of_a_gaussian_posterior_is_found():
    problem = Conjugate()
    found = map_estimate(problem.full, problem.x, problem.y, num_steps=200, learning_rate=0.5, seed=0, progress=False)
    assert_close(found["w"], problem.mean.unsqueeze(0), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_mini_batches_come_close_with_a_falling_rate():
    problem = Conjugate()
    settings = {"batch_size": 20, "num_steps": 600, "learning_rate": 0.2, "decay": True, "progress": False}
    found = map_estimate(problem.full, problem.x, problem.y, seed=0, **settings)
    assert (found["w"][0] - problem.mean).abs().max() < 0.03
    again = map_estimate(problem.full, problem.x, problem.y, seed=0, **settings)
    assert torch.equal(found["w"], again["w"])


@pytest.mark.slow
def test_the_state_that_validates_best_is_returned():
    problem = Conjugate()
    # Data that no weights but zero explain: the first look, nearest to the start at zero, is the best.
    validation = (10 * problem.x, torch.zeros(200))
    settings = {"num_steps": 40, "learning_rate": 0.1, "check_every": 1, "seed": 0, "progress": False}
    first = map_estimate(problem.full, problem.x, problem.y, **{**settings, "num_steps": 1})
    found = map_estimate(problem.full, problem.x, problem.y, validation=validation, **settings)
    assert_close(found["w"], first["w"])


def test_models_without_latents():
    with pytest.raises(ModelError, match="no latent"):
        map_estimate(null, progress=False)
