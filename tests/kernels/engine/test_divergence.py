# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Detection of divergence, states that chains are put back to, and the error, on tensors and a quadratic potential."""

import math

import pytest
import torch

from pyro_apd.errors import DataError
from pyro_apd.kernels.engine.divergence import DivergenceReport, DivergenceWatch, LastStep, of_chain
from pyro_apd.models.layout import Layout

LAYOUT = Layout({"w": (2,), "b": ()}, {})
CURVATURE = torch.tensor([1.0, 45.0, 4.0])


def states(theta):
    """A state by site."""
    return tuple(piece.clone() for piece in theta.split([2, 1], -1))


def watching(theta):
    return DivergenceWatch(states(theta), theta, scale=3.0)


def test_a_rise_far_above_the_start_and_values_that_are_not_finite_are_divergence():
    theta = torch.zeros(4, 3)
    watch = watching(theta)
    assert watch.diverged(torch.full((4,), 10.0), states(theta)) == []
    rise = 1e3 * (10.0 + 3.0)
    energy = torch.tensor([10.0 + 0.9 * rise, 10.0 + 1.1 * rise, math.nan, -1e9])
    assert watch.diverged(energy, states(theta)) == [1, 2]
    theta[3, 2] = math.inf
    assert watch.diverged(torch.full((4,), 10.0), states(theta)) == [3]


def test_a_single_chain():
    watch = watching(torch.zeros(3))
    assert watch.diverged(torch.tensor(1.0), states(torch.zeros(3))) == []
    assert watch.is_finite(torch.tensor(1.0))
    assert not watch.is_finite(torch.tensor(math.nan))
    assert watch.diverged(torch.tensor(math.nan), states(torch.zeros(3))) == [0]


def test_a_state_becomes_the_checkpoint_at_the_check_after_it():
    start, first, second = (torch.full((2, 3), value) for value in (0.0, 1.0, 2.0))
    watch = watching(start)
    watch.passed(states(first), 50, 4)
    assert torch.equal(watch.checkpoint, start)
    watch.passed(states(second), 100, 9)
    assert torch.equal(watch.checkpoint, first)
    assert (watch.checked_step, watch.last_good_step, watch.num_safe_draws) == (100, 99, 9)
    theta = states(torch.full((2, 3), 7.0))
    watch.put_back([1], theta)
    assert torch.equal(torch.cat(theta, -1), torch.stack([torch.full((3,), 7.0), first[1]]))
    watch.passed(theta, 150, 9)
    assert torch.equal(watch.checkpoint, torch.stack([second[0], first[1]]))  # not the lost candidate


def report(first_number=None):
    return DivergenceReport(
        "Sampler", LAYOUT, lambda theta, inputs: (CURVATURE * theta, theta.square().sum()), first_number
    )


def last_step(theta, energy, step=70):
    return LastStep(step, 1.0, torch.as_tensor(energy), states(theta), ())


def test_the_error_of_a_single_chain():
    watch = watching(torch.zeros(3))
    watch.diverged(torch.tensor(2.0), states(torch.zeros(3)))
    watch.passed(states(torch.zeros(3)), 50, 1)
    last = last_step(torch.tensor([1.0, -8.0, 3.0]), 1e6)
    error = report().error(0, last, watch, [torch.tensor([1.0, 2.0, 3.0])])
    assert "Sampler diverged by Langevin step 70: potential 1e+06, at the start 2; site 'w' at |value| 8" in str(error)
    assert "curvature met is about 45, so step sizes must stay under 0.089; try step_size=8e-03" in str(error)
    assert (error.site, error.chain, error.step, error.last_good_step) == ("w", 0, 70, 49)
    assert error.suggested_step_size == pytest.approx(8e-3)
    assert error.draws["w"].tolist() == [[1.0, 2.0]]
    assert error.draws["b"].tolist() == [3.0]


def test_the_error_of_one_of_several_chains_has_its_number_in_the_run():
    theta = torch.zeros(2, 3)
    watch = watching(theta)
    watch.diverged(torch.zeros(2), states(theta))
    error = report(first_number=4).error(1, last_step(theta, [0.0, math.nan]), watch, [])
    assert "diverged in chain 5 by" in str(error)
    assert error.chain == 1
    watch.freeze([error])
    assert watch.is_frozen.tolist() == [False, True]
    assert watch.is_finite(torch.tensor([1.0, math.nan]))
    assert watch.diverged(torch.tensor([1.0, math.nan]), states(theta)) == []


def test_where_no_curvature_is_finite_a_tenth_of_the_step_is_suggested():
    watch = watching(torch.zeros(3))
    watch.diverged(torch.tensor(1.0), states(torch.zeros(3)))
    nowhere = DivergenceReport("Sampler", LAYOUT, lambda theta, inputs: (theta * math.nan, theta.sum()), None)
    error = nowhere.error(0, last_step(torch.zeros(3), 5.0), watch, [])
    assert error.suggested_step_size == pytest.approx(0.1)


def test_a_start_without_density_is_an_error_of_the_data():
    watch = watching(torch.zeros(3))
    watch.diverged(torch.tensor(math.inf), states(torch.zeros(3)))
    with pytest.raises(DataError, match="The potential is inf at the starting point"):
        report().error(0, last_step(torch.zeros(3), math.inf, step=1), watch, [])


def test_state_restores():
    theta = torch.arange(6.0).reshape(2, 3)
    watch = watching(theta)
    watch.diverged(torch.tensor([1.0, 2.0]), states(theta))
    watch.freeze([report(0).error(0, last_step(theta, [9.0, 2.0]), watch, [])])
    watch.passed(states(theta + 1), 50, 0)
    again = watching(torch.zeros(2, 3))
    again.load_state_dict(watch.state_dict())
    assert torch.equal(again.checkpoint, theta)
    assert torch.equal(again.is_frozen, watch.is_frozen)
    assert [str(error) for error in again.divergences] == [str(error) for error in watch.divergences]
    again.passed(states(theta), 100, 0)
    assert torch.equal(again.checkpoint, theta + 1)
    assert again.diverged(torch.tensor([0.0, 1e9]), states(theta)) == [1]


def test_tensors_of_one_chain():
    tensors = (torch.arange(4.0).reshape(2, 2), torch.arange(2.0))
    assert [t.tolist() for t in of_chain(tensors, 1)] == [[2.0, 3.0], 1.0]
    assert of_chain(tensors, None) == tensors
