# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Networks of a start of their own."""

import pytest
import torch
from torch.testing import assert_close

from pyro_apd.baselines import deep_ensemble, map_estimate
from tests.support.models import Classifier, Conjugate

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()


def test_all_members_find_the_one_mode():
    problem = Conjugate()
    settings = {"num_steps": 60, "learning_rate": 0.8, "seed": 0, "progress": False}
    found = deep_ensemble(problem.full, problem.x, problem.y, num_networks=3, **settings)
    assert_close(found["w"], problem.mean.expand(3, 3), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_members_differ_and_the_first_is_a_map_estimate():
    settings = {"num_steps": 40, "batch_size": 20, "seed": 3, "progress": False}
    many = deep_ensemble(Classifier(), X, Y, num_networks=3, **settings)
    one = map_estimate(Classifier(), X, Y, **settings)
    assert {name: value.shape[0] for name, value in many.items()} == dict.fromkeys(many, 3)
    for name, value in one.items():
        assert_close(many[name][:1], value)
    assert (many["first.weight"][0] - many["first.weight"][1]).abs().max() > 0.1


def test_numbers_out_of_range():
    with pytest.raises(ValueError, match=r"num_networks.*0"):
        deep_ensemble(Classifier(), X, Y, num_networks=0)
