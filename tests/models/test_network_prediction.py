# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Predictions of networks are those of the model, and scores those of their module."""

import threading

import pytest
import torch
from torch import nn

import pyro_apd as apd
from pyro_apd.models.network_prediction import NetworkPrediction
from tests.support.exported import low_rank_posterior, mlp, subspace_posterior


class Recurrent(nn.Module):
    """An operation that vmap does not know."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


def test_probabilities_and_scores_are_those_of_the_model():
    posterior, bnn = subspace_posterior()
    x, draws = torch.randn(5, 4), posterior.get_samples(6, seed=0)
    names = ("mean", "mutual_information", "networks")
    found = posterior.ensemble(6, net=bnn, outputs=names, seed=0)(x)
    probs_SNK = apd.outputs(bnn, draws, x).probs_SNK
    assert tuple(found) == names
    torch.testing.assert_close(found["networks"], probs_SNK)
    torch.testing.assert_close(found["mean"], posterior.ensemble(6, net=bnn, seed=0)(x))
    torch.testing.assert_close(found["mutual_information"], apd.uncertainty.mutual_information(probs_SNK))


@pytest.mark.parametrize("noise_scale", [None, 0.3])
def test_intervals_contain_the_noise_of_the_model(noise_scale):
    posterior, bnn = subspace_posterior(1, likelihood="gaussian", noise_scale=noise_scale)
    x, draws = torch.randn(5, 4), posterior.get_samples(6, seed=0)
    expected = apd.outputs(bnn, draws, x)
    found = posterior.ensemble(6, net=bnn, outputs=("mean", "expected_variance", "lower"), seed=0)(x)
    torch.testing.assert_close(found["mean"], expected.mean_SN.mean(0))
    torch.testing.assert_close(found["expected_variance"], expected.variance_SN.mean(0))
    assert (found["lower"] < found["mean"]).all()


def test_labels():
    posterior, bnn = subspace_posterior(2, likelihood="bernoulli")
    x, draws = torch.randn(5, 4), posterior.get_samples(6, seed=0)
    found = posterior.ensemble(6, net=bnn, outputs=("mean", "mutual_information"), seed=0)(x)
    expected = apd.outputs(bnn, draws, x).probs_SNK[..., 1].unflatten(1, (5, 2))
    torch.testing.assert_close(found["mean"], expected.mean(0))
    assert found["mutual_information"].shape == (5, 2)


def test_plain_networks_have_a_link():
    posterior, _ = subspace_posterior()
    with pytest.raises(ValueError, match="link"):
        posterior.ensemble(3, net=mlp(), outputs=["mean"])
    found = posterior.ensemble(3, net=mlp(), outputs=["mean"], link="softmax")(torch.randn(2, 4))
    torch.testing.assert_close(found["mean"].sum(-1), torch.ones(2))


def test_what_vmap_does_not_know_is_done_one_by_one(caplog):
    posterior, bnn = low_rank_posterior(Recurrent())
    x, draws = torch.randn(2, 3, 4), posterior.get_samples(3, seed=0)
    found = posterior.ensemble(3, net=bnn, outputs=["networks"], seed=0)(x)["networks"]
    for i in range(3):
        net = posterior.network({name: value[i] for name, value in draws.items()}, net=bnn)
        torch.testing.assert_close(found[i], net(x).softmax(-1))
    assert caplog.text.count("Evaluating draws one by one, which is slower: Batching rule not implemented") == 1


def test_an_error_that_a_network_raises_once_is_not_hidden():
    class Failing(Recurrent):
        fails = False

        def forward(self, x):
            if Failing.fails:
                Failing.fails = False
                raise RuntimeError("a fault of its own")
            return super().forward(x)

    posterior, bnn = low_rank_posterior(Failing())
    scored = posterior.ensemble(3, net=bnn, outputs=["networks"], seed=0)
    Failing.fails = True
    with pytest.raises(RuntimeError, match="a fault of its own"):
        scored(torch.randn(2, 3, 4))
    assert scored(torch.randn(2, 3, 4))["networks"].shape == (3, 2, 3)


def test_errors_of_the_network_are_raised():
    posterior, bnn = subspace_posterior()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        posterior.ensemble(3, net=bnn, outputs=["mean"])(torch.randn(2, 5))


def test_chunks_make_no_difference_and_gradients_reach_inputs():
    posterior, bnn = subspace_posterior()
    x = torch.randn(5, 4, requires_grad=True)
    whole, parts = (
        posterior.ensemble(6, net=bnn, outputs=["predictive_entropy"], seed=0, chunk_size=size)(x)["predictive_entropy"]
        for size in (None, 4)
    )
    torch.testing.assert_close(whole, parts)
    parts.sum().backward()
    assert x.grad.abs().sum() > 0


def test_threads_have_networks_of_their_own():
    posterior, bnn = subspace_posterior()
    draws, x, found = posterior.get_samples(2, seed=0), torch.randn(5, 4), {}
    network = NetworkPrediction(bnn, posterior.layout, {n: v[0] for n, v in draws.items()})
    both = threading.Barrier(2, timeout=20)

    # Each waits within its forward until the other is there, with other weights in its network.
    def wait(*_):
        both.wait()

    network.net[0].register_forward_hook(wait)

    def one(i):
        found[i] = network({name: value[i] for name, value in draws.items()}, x)[0]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        net = posterior.network({name: value[i] for name, value in draws.items()}, net=bnn)
        torch.testing.assert_close(found[i], net(x).softmax(-1))


class Merged(nn.Module):
    """Two inputs and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.frozen, self.out = nn.Linear(4, 5).requires_grad_(False), nn.Linear(7, 3)

    def forward(self, x, z):
        return self.out(torch.cat([self.frozen(x).tanh(), z], -1))


@pytest.mark.parametrize("bayesian", [None, "lora:2", ["lora:2", "out"]])
def test_several_inputs_and_trained_parts(bayesian):
    posterior, bnn = low_rank_posterior(Merged(), bayesian=bayesian)
    x, z = torch.randn(5, 4), torch.randn(5, 2)
    draws = posterior.get_samples(6, seed=0)
    expected = apd.outputs(bnn, draws, (x, z)).probs_SNK
    scoring = posterior.ensemble(6, net=bnn, outputs=["networks", "mean"], seed=0)
    average = posterior.ensemble(6, net=bnn, seed=0)
    torch.testing.assert_close(scoring((x, z))["networks"], expected)
    torch.testing.assert_close(scoring({"x": x, "z": z})["mean"], expected.mean(0))
    torch.testing.assert_close(average((x, z)), expected.mean(0))
    first = posterior.network({name: value[0] for name, value in draws.items()}, net=bnn)
    torch.testing.assert_close(first(x, z).softmax(-1), expected[0])
