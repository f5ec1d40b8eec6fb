# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What is measured around a state, chain by chain."""

import math

import pytest
import torch

from pyro_apd.kernels.adaptation.dynamics import Dynamics
from pyro_apd.kernels.adaptation.spectrum import LocalPotential, measure_spectrum
from pyro_apd.kernels.engine.chain_set import ChainSet


def around(curvature, chains=None, epoch=1, is_active=None):
    """A quadratic potential on full data."""
    curvature = torch.as_tensor(curvature, dtype=torch.float64)
    if chains is None:
        chains = ChainSet(count=len(curvature) if curvature.dim() > 1 else None)
    theta = torch.full_like(curvature, 0.3)
    return LocalPotential(
        lambda at, inputs: (at * curvature, (at.square() * curvature).sum(-1) / 2),
        tuple,
        theta,
        Dynamics(),
        1.0,
        epoch,
        is_active,
        chains,
    )


def test_random_vectors_depend_on_the_seed_and_the_number_of_the_chain_alone():
    three = around(torch.ones(3, 5)).random(1)
    assert len({tuple(row) for row in three.tolist()}) == 3
    last = around(torch.ones(2, 5), ChainSet(1, 2, total=3)).random(1)
    assert torch.equal(last, three[1:])
    assert torch.equal(around(torch.ones(5), ChainSet(2)).random(1), three[2])
    assert not torch.equal(around(torch.ones(3, 5)).random(2), three)


def test_the_largest_curvature_of_each_chain():
    curvature = torch.ones(2, 40)
    curvature[0, 3], curvature[1, 7] = 30.0, 80.0
    assert around(curvature).largest_curvature(0).tolist() == pytest.approx([30.0, 80.0], rel=1e-3)


@pytest.mark.parametrize("size", [3, 40])
def test_curvature_that_is_not_finite_is_no_error(size):
    curvature = torch.ones(2, size)
    curvature[1, 0] = math.nan
    found = around(curvature).largest_curvature(0)
    assert float(found[0]) == pytest.approx(1.0)
    assert math.isnan(float(found[1]))
    measure_spectrum(around(curvature), 0)


def test_chains_that_have_diverged_do_not_count():
    local = around(torch.ones(3, 2), is_active=torch.tensor([True, False, True]))
    assert local.active(torch.arange(3)).tolist() == [0, 2]
    assert around(torch.ones(3, 2)).active(torch.arange(3)).tolist() == [0, 1, 2]
