# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Mean and variances of draws are kept, whatever the rank."""

import pytest
import torch
from torch.testing import assert_close

from pyro_apd.baselines import low_rank
from pyro_apd.baselines.low_rank import fit_low_rank


def covariance(generator):
    return (generator.deviations.T @ generator.deviations + torch.diag(generator.scale**2)).detach()


def test_variances_are_those_of_the_draws():
    theta_SD = torch.randn(40, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    expected = torch.cov(theta_SD.T, correction=0)
    for rank in (1, 3):
        found = fit_low_rank(theta_SD, rank)
        assert_close(found.location.detach(), theta_SD.mean(0))
        assert_close(covariance(found).diag(), expected.diag())
    assert_close(covariance(fit_low_rank(theta_SD, 6)), expected)


def test_of_a_dict():
    draws = {"a": torch.randn(20, 3), "b": torch.randn(20, 2, 2)}
    posterior = low_rank(draws, rank=2)
    found = posterior.get_samples(2000, seed=0)
    assert_close(found["a"].mean(0), draws["a"].mean(0), atol=0.1, rtol=0)
    assert_close(found["b"].std(0), draws["b"].std(0, correction=0), atol=0.1, rtol=0)
    with pytest.raises(ValueError, match=r"rank.*0"):
        low_rank(draws, rank=0)
