# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Mean and variances of draws are kept, whatever the rank."""

import pytest
import torch
from torch.testing import assert_close

from pyro_apd.baselines import low_rank
from pyro_apd.baselines.low_rank import fit_low_rank, principal_directions


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


def test_directions_are_those_of_the_singular_vectors(monkeypatch):
    theta_SD = torch.randn(12, 30, dtype=torch.float64) @ torch.randn(30, 30, dtype=torch.float64)
    left, singular, right = torch.linalg.svd(theta_SD - theta_SD.mean(0), full_matrices=False)
    location_D, basis_RD, coordinates_SR = principal_directions(theta_SD, 4)
    assert_close(location_D, theta_SD.mean(0))
    assert_close(coordinates_SR @ basis_RD, left[:, :4] * singular[:4] @ right[:4])
    assert_close(coordinates_SR.mT @ coordinates_SR / 12, torch.eye(4, dtype=torch.float64))
    assert principal_directions(theta_SD, 40)[1].shape == (11, 30)
    monkeypatch.setitem(principal_directions.__globals__, "_COLUMNS", 7)
    assert_close(principal_directions(theta_SD, 4)[1], basis_RD)


def test_draws_without_variance_are_refused():
    for theta_SD in (torch.ones(20, 3), torch.rand(50).expand(7, 50).clone()):
        with pytest.raises(ValueError, match="All draws are the same"):
            principal_directions(theta_SD, 2)
