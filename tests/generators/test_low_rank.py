# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The covariance is that of the parameters."""

import json

import pytest
import torch
from torch.testing import assert_close

from pyro_apd.generators import LowRankGenerator, build_generator


def example():
    torch.manual_seed(1)
    return LowRankGenerator.of(torch.randn(5), torch.randn(2, 5), torch.rand(5))


def test_mean_and_covariance():
    generator = example()
    # A linear map of standard normals: its matrix, from unit vectors, gives the covariance exactly.
    at_zero = generator(torch.zeros(1, generator.latent_size))
    matrix = generator(torch.eye(generator.latent_size)) - at_zero
    assert_close(at_zero[0], generator.location.detach())
    expected = generator.deviations.T @ generator.deviations + torch.diag(generator.scale**2)
    assert_close(matrix.T @ matrix, expected)


def test_config_and_state_rebuild_the_generator():
    original = example()
    rebuilt = build_generator(json.loads(json.dumps(original.config)))
    rebuilt.load_state_dict(original.state_dict())
    latent_SL = torch.randn(6, original.latent_size)
    assert torch.equal(rebuilt(latent_SL), original(latent_SL))


def test_sizes_that_are_none():
    with pytest.raises(ValueError, match="rank=0"):
        build_generator({"kind": "low-rank", "output_size": 3, "rank": 0})
