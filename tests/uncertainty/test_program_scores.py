# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Scores of exported programs are those of `pyro_apd.uncertainty`."""

import pytest
import torch

from pyro_apd import uncertainty
from pyro_apd.uncertainty.program_scores import OF_MOMENTS, OF_PROBABILITIES, Scores, mixture_quantiles


@pytest.fixture
def probs_SNK():
    return torch.randn(7, 5, 4).softmax(-1)


@pytest.mark.parametrize("name", sorted(set(OF_PROBABILITIES) - {"mean", "networks"}))
def test_scores_of_probabilities(name, probs_SNK):
    (found,) = Scores.of("softmax", [name])(probs_SNK)
    torch.testing.assert_close(found, getattr(uncertainty, name)(probs_SNK), rtol=1e-5, atol=1e-6)


def test_networks_that_agree_have_no_information(probs_SNK):
    same = probs_SNK[:1].expand(6, -1, -1)
    information, variance = Scores.of("softmax", ["mutual_information", "model_variance"])(same)
    assert information.eq(0).all()
    assert variance.eq(0).all()


def test_certain_networks_have_no_entropy():
    certain = torch.eye(3).expand(4, 3, 3)
    for score in Scores.of("softmax", ["predictive_entropy", "expected_entropy"])(certain):
        assert score.eq(0).all()


def test_of_two_classes_the_second_is_shown(probs_SNK):
    pairs = torch.randn(6, 5, 2).softmax(-1)
    mean, networks, entropy = Scores.of("sigmoid", ["mean", "networks", "predictive_entropy"])(pairs)
    torch.testing.assert_close(mean, pairs.mean(0)[:, 1])
    torch.testing.assert_close(networks, pairs[..., 1])
    torch.testing.assert_close(entropy, uncertainty.predictive_entropy(pairs))


def test_moments():
    mean_SN, variance_SN = torch.randn(9, 5), torch.rand(9, 5)
    found = dict(zip(OF_MOMENTS, Scores.of("identity", OF_MOMENTS)(mean_SN, variance_SN), strict=True))
    torch.testing.assert_close(found["mean"], mean_SN.mean(0))
    torch.testing.assert_close(found["model_variance"], uncertainty.epistemic_variance(mean_SN))
    torch.testing.assert_close(found["expected_variance"], uncertainty.aleatoric_variance(variance_SN))
    torch.testing.assert_close(found["variance"], uncertainty.total_variance(mean_SN, variance_SN))
    torch.testing.assert_close(found["networks"], mean_SN)
    normal = torch.distributions.Normal(mean_SN, variance_SN.sqrt())
    torch.testing.assert_close(normal.cdf(found["lower"]).mean(0), torch.full((5,), 0.05), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.cdf(found["upper"]).mean(0), torch.full((5,), 0.95), atol=1e-5, rtol=0)


def test_quantiles_without_noise_are_those_of_the_networks():
    mean_SN = torch.arange(11.0).unsqueeze(1)
    found = mixture_quantiles(mean_SN, torch.zeros(11, 1), [0.25, 0.75])
    torch.testing.assert_close(found, torch.tensor([[2.0], [8.0]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("names", [(), ("mean", "entropy"), ("lower",), "nothing"])
def test_unknown_outputs_are_refused(names):
    with pytest.raises(ValueError, match=r"outputs=.* must name some of 'mean', 'predictive_entropy'"):
        Scores.of("softmax", names)


def test_an_interval_is_a_probability():
    with pytest.raises(ValueError, match="interval"):
        Scores.of("identity", ["lower"], 1.0)
