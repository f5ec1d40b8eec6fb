# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Quantiles of mixtures against a normal distribution, and against the distribution function."""

import torch
from torch.testing import assert_close

from pyro_apd.sklearn.mixtures import mixture_quantiles

LEVELS = [0.001, 0.25, 0.5, 0.95]


def test_of_one_component():
    mean, sd = torch.tensor([[0.0, 5.0]]).double(), torch.tensor([[1.0, 0.1]]).double()
    normal = torch.distributions.Normal(mean[0], sd[0])
    expected = torch.stack([normal.icdf(torch.tensor(level).double()) for level in LEVELS])
    assert_close(mixture_quantiles(mean, sd, LEVELS), expected, rtol=1e-7, atol=1e-9)


def test_the_distribution_function_there_is_the_level():
    mean, sd = torch.randn(9, 4).double() * 3, torch.rand(9, 4).double() + 0.01
    found = mixture_quantiles(mean, sd, LEVELS)
    for level, quantile in zip(LEVELS, found, strict=True):
        assert_close(torch.special.ndtr((quantile - mean) / sd).mean(0), torch.full((4,), level).double())
