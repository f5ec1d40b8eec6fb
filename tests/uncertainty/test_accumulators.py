# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Averages taken in passing agree with those of all draws at once."""

import pytest
import torch
from torch.testing import assert_close

from pyro_apd import uncertainty
from pyro_apd.uncertainty.accumulators import OF_MOMENTS, OF_PROBABILITIES, MomentReduction, ProbabilityReduction


def log_probs(num_draws=30, scale=2.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(num_draws, 11, 4, generator=generator, dtype=dtype)).log_softmax(-1)


def reduced(log_probs_SNK, chunk=7, block=5, names=OF_PROBABILITIES):
    num_draws, num_data, _ = log_probs_SNK.shape
    reduction = ProbabilityReduction(num_data, names)
    for start in range(0, num_draws, chunk):
        for row in range(0, num_data, block):
            data = slice(row, min(row + block, num_data))
            reduction.add(data, log_probs_SNK[start : start + chunk, data].clone())
    return reduction.result()


@pytest.mark.parametrize("scale", [1e-3, 2.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_those_of_all_draws(scale, dtype):
    log_probs_SNK = log_probs(scale=scale, dtype=dtype)
    scores, probs_SNK = reduced(log_probs_SNK), log_probs_SNK.exp()
    assert tuple(scores) == OF_PROBABILITIES
    assert_close(scores["mean_probability"], probs_SNK.mean(0))
    for name in OF_PROBABILITIES[1:]:
        expected = getattr(uncertainty, name)(probs_SNK)
        assert_close(scores[name], expected, rtol=2e-3 if scale < 1 else 1e-4, atol=1e-9 if scale < 1 else 1e-5)
        assert scores[name].dtype == dtype


@pytest.mark.parametrize(("chunk", "block"), [(1, 1), (3, 11), (30, 2)])
def test_chunks_change_nothing(chunk, block):
    for name, value in reduced(log_probs(), chunk, block).items():
        assert_close(value, reduced(log_probs(), 30, 11)[name])


def test_equal_draws_disagree_by_exactly_nothing():
    scores = reduced(log_probs(1).expand(30, -1, -1))
    for name in ("mutual_information", "model_variance", "variation_ratio"):
        assert (scores[name] == 0).all()


def test_certain_draws():
    log_probs_SNK = torch.full((2, 1, 2), -torch.inf)
    log_probs_SNK[0, 0, 0] = log_probs_SNK[1, 0, 1] = 0.0
    scores = reduced(log_probs_SNK)
    assert_close(scores["mutual_information"], torch.tensor([2.0]).log())
    assert_close(scores["expected_entropy"], torch.zeros(1))
    assert_close(scores["model_variance"], torch.tensor([0.5]))


def test_only_what_was_asked_for():
    assert set(reduced(log_probs(), names=("mutual_information",))) == {"mutual_information"}


def test_moments():
    generator = torch.Generator().manual_seed(0)
    mean_SN, variance_SN = 1e4 + torch.randn(20, 6, generator=generator), torch.rand(20, 6, generator=generator)
    reduction = MomentReduction(6, OF_MOMENTS)
    for start in range(0, 20, 7):
        for data in (slice(0, 4), slice(4, 6)):
            part = slice(start, start + 7)
            reduction.add(data, torch.stack([mean_SN[part, data], variance_SN[part, data]], -1))
    moments = reduction.result()
    between_N = mean_SN.double().var(0, correction=0).float()
    assert_close(moments["mean"], mean_SN.mean(0))
    assert_close(moments["model_variance"], between_N)
    assert_close(moments["expected_variance"], variance_SN.mean(0))
    assert_close(moments["variance"], variance_SN.mean(0) + between_N)
