# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Which draws are kept."""

import pytest
import torch

from pyro_apd.baselines import stored_draws
from pyro_apd.baselines.stored_draws import herded
from tests.support.models import Conjugate

DRAWS = {"w": torch.arange(20.0)[:, None].expand(20, 3)}


def test_thinned_draws_are_evenly_spaced():
    assert stored_draws(DRAWS, 5)["w"][:, 0].tolist() == [0.0, 5.0, 10.0, 14.0, 19.0]
    assert stored_draws(DRAWS, 20)["w"].equal(DRAWS["w"])


def test_chains_take_turns():
    by_chain = {"w": torch.arange(20.0).reshape(2, 10)}
    assert stored_draws(by_chain, 20, group_by_chain=True)["w"][:4].tolist() == [0.0, 10.0, 1.0, 11.0]


def test_herding_begins_in_the_middle_and_then_spreads():
    values_SNF = torch.tensor([-10.0, -9.0, 0.5, 9.0, 10.0]).reshape(5, 1, 1)
    order = herded(values_SNF, 5).tolist()
    assert order[0] == 2
    assert sorted(order) == [0, 1, 2, 3, 4]


def test_herding_takes_from_each_of_two_modes():
    values_SNF = torch.cat([torch.randn(10, 4, 1), 50 + torch.randn(10, 4, 1)])
    chosen = herded(values_SNF, 2)
    assert sorted((chosen < 10).tolist()) == [False, True]


def test_herded_draws_fit_better_than_chance():
    problem = Conjugate()
    draws = {"w": torch.distributions.MultivariateNormal(problem.mean, problem.covariance).sample((200,))}
    kept = stored_draws(draws, 10, method="herded", model=problem.full, data=(problem.x, problem.y), seed=0)["w"]
    again = stored_draws(draws, 10, method="herded", model=problem.full, data=(problem.x, problem.y), seed=0)["w"]
    assert kept.equal(again)
    error = (kept.mean(0) - draws["w"].mean(0)).norm()
    by_chance = [(draws["w"][torch.randperm(200)[:10]].mean(0) - draws["w"].mean(0)).norm() for _ in range(100)]
    assert error < torch.stack(by_chance).median()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_draws": 0}, "num_draws.*0"),
        ({"num_draws": 21}, "at most 20.*21"),
        ({"num_draws": 3, "method": "best"}, "method='best'.*thinned.*herded"),
        ({"num_draws": 3, "method": "herded"}, "give .model. and .data."),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        stored_draws(DRAWS, **settings)
