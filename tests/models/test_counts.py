# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The negative binomial distribution against scipy's, also where it is nearly a Poisson's."""

import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from pyro_apd.models.counts import OverdispersedPoisson


@pytest.mark.parametrize("overdispersion", [3.0, 0.5, 0.01])
def test_density_and_moments(overdispersion):
    mean = torch.tensor([0.1, 1.0, 30.0])
    fn = OverdispersedPoisson(mean, torch.tensor(overdispersion))
    phi = overdispersion**-2
    reference = stats.nbinom(phi, phi / (phi + mean.double().numpy()))
    for count in (0.0, 1.0, 40.0):
        expected = torch.as_tensor(reference.logpmf(count)).float()
        assert_close(fn.log_prob(torch.tensor(count)), expected, rtol=1e-5, atol=1e-6)
    assert_close(fn.mean, mean)
    assert_close(fn.variance, torch.as_tensor(reference.var()).float())


def test_without_overdispersion_it_is_a_poisson_in_single_precision():
    """With log-gamma functions in single precision the density would be wrong by more than 1."""
    mean, count = torch.tensor([2.0, 50.0]), torch.tensor([3.0, 45.0])
    fn = OverdispersedPoisson(mean, torch.tensor(1e-4))
    expected = torch.as_tensor(stats.poisson.logpmf(count, mean)).float()
    assert_close(fn.log_prob(count), expected, rtol=1e-5, atol=1e-5)


def test_samples_have_the_moments():
    torch.manual_seed(0)
    fn = OverdispersedPoisson(torch.tensor([0.5, 20.0]), torch.tensor(0.7)).expand((3, 2))
    assert fn.batch_shape == (3, 2)
    counts = fn.sample((20_000,)).reshape(-1, 2)
    assert_close(counts.mean(0), torch.tensor([0.5, 20.0]), rtol=0.02, atol=0)
    assert_close(counts.var(0), fn.variance[0], rtol=0.05, atol=0)
    assert fn.sample((5,)).shape == (5, 3, 2)


def test_its_values_are_counts():
    fn = OverdispersedPoisson(torch.tensor(1.0), torch.tensor(1.0), validate_args=True)
    with pytest.raises(ValueError, match="support"):
        fn.log_prob(torch.tensor(0.5))
    with pytest.raises(ValueError, match="overdispersion"):
        OverdispersedPoisson(torch.tensor(1.0), torch.tensor(-1.0), validate_args=True)
