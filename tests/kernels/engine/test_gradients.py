# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Gradient estimators are given to a chain, and its steps use them."""

import pytest
import torch

from pyro_apd.kernels import SGLD
from pyro_apd.kernels.engine.chain_set import ChainSet
from pyro_apd.kernels.engine.control_variates import ControlVariates
from pyro_apd.kernels.engine.data_parallel import DataParallelGradient
from pyro_apd.kernels.engine.gradients import PlainGradient
from pyro_apd.models.building import build_potential
from pyro_apd.runtime.ranks import Ranks
from tests.support.models import Conjugate

PROBLEM = Conjugate()
DATA = (PROBLEM.x, PROBLEM.y)


def potential():
    return build_potential(PROBLEM.full, DATA, {}, batch_size=50)[0]


@pytest.mark.parametrize(
    "build",
    [PlainGradient, ControlVariates, lambda part: DataParallelGradient(part, Ranks())],
    ids=["plain", "control variates", "data parallel"],
)
def test_every_estimator_measures_by_the_plain_gradient(build):
    part = potential()
    estimator = build(part)
    theta = torch.tensor([0.3, -1.0, 0.2])
    estimator.prepare((torch.zeros(3),))
    inputs = part.source.draw()
    for found, expected in zip(estimator.gradient(theta, inputs), part.gradient(theta, inputs), strict=True):
        torch.testing.assert_close(found, expected)
    assert (estimator.num_data, estimator.path) == (200, "captured")
    assert estimator.gradient_function((theta,), inputs)((theta,), inputs)[0][0].shape == (3,)


def test_the_plain_estimator_adds_nothing_to_a_step():
    part = potential()
    pieces, inputs = (torch.zeros(3),), part.source.draw()
    assert PlainGradient(part).gradient_function(pieces, inputs) is part.gradient_function(pieces, inputs)
    assert PlainGradient(part).state_dict() is None


def test_a_kernel_chooses_the_estimator():
    assert type(SGLD(PROBLEM.full, 1e-3).begin(DATA, {}, warmup_steps=0).estimator) is PlainGradient
    varied = SGLD(PROBLEM.full, 1e-3, batch_size=50, control_variates=True).begin(DATA, {}, warmup_steps=0)
    assert type(varied.estimator) is ControlVariates
    chains = ChainSet(data_ranks=Ranks())
    assert type(SGLD(PROBLEM.full, 1e-3).begin(DATA, {}, warmup_steps=0, chains=chains).estimator) is (
        DataParallelGradient
    )


def test_steps_use_the_estimator_of_the_chain():
    """At its centre a control variate gives the gradient of all data, whatever the mini-batch."""
    start = {"w": torch.tensor([0.5, -0.2, 0.1])}
    kernel = SGLD(PROBLEM.full, 1e-3, batch_size=50, control_variates=True, temperature=0.0, seed=0)
    chain = kernel.begin(DATA, {}, warmup_steps=0, initial_params=start)
    assert chain.state_dict()["estimator"] is None
    chain.advance(1)
    gradient = start["w"] + PROBLEM.x.T @ (PROBLEM.x @ start["w"] - PROBLEM.y)
    torch.testing.assert_close(chain.theta, start["w"] - 0.5e-3 * gradient, rtol=1e-4, atol=1e-4)
    assert torch.equal(chain.state_dict()["estimator"]["centre"][0], start["w"])


def test_control_variates_resume_about_the_same_state():
    kernels = [SGLD(PROBLEM.full, 1e-3, batch_size=50, control_variates=True, seed=2) for _ in range(2)]
    one, other = (kernel.begin(DATA, {}, warmup_steps=0) for kernel in kernels)
    one.advance(5)
    other.load_state_dict(one.state_dict())
    for chain in (one, other):
        chain.advance(7)
    assert torch.equal(one.theta, other.theta)


def test_control_variates_are_not_used_before_they_have_a_centre():
    part = potential()
    theta, inputs = torch.zeros(3), part.source.draw()
    with pytest.raises(RuntimeError, match="prepare"):
        ControlVariates(part).gradient_function((theta,), inputs)
