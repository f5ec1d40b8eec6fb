# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Networks of several inputs, through everything that takes data."""

from collections import UserDict
from types import SimpleNamespace

import pyro.infer
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.testing import assert_close

import pyro_apd as apd
from pyro_apd.errors import DataError, ModelError
from pyro_apd.models.network_inputs import NetworkInputs

N = 24


class Pair(nn.Module):
    """A network of two inputs, with named outputs on request."""

    def __init__(self, named=False):
        super().__init__()
        self.first, self.second, self.named = nn.Linear(3, 4), nn.Linear(2, 4), named

    def forward(self, a, b, scale=1.0):
        logits = self.first(a) * scale + self.second(b).tanh()
        return SimpleNamespace(logits=logits) if self.named else logits


A, B = torch.randn(N, 3), torch.randn(N, 2)
Y = torch.arange(N) % 4
CALLS = {
    "tuple": (((A, B),), {}),
    "list": (([A, B],), {}),
    "dict": (({"a": A, "b": B},), {}),
    "tokenizer": ((UserDict(a=A, b=B),), {}),
    "keywords": ((), {"a": A, "b": B}),
    "one and a keyword": ((A,), {"b": B}),
}


def posterior_draws(bnn, num_draws=12):
    return {name: prior.sample((num_draws,)) for name, prior in bnn.priors.items()}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("named", [False, True])
def test_a_model_of_two_inputs(call, named):
    args, kwargs = CALLS[call]
    bnn = apd.BNN(Pair(named))
    draw = {name: value[0] for name, value in posterior_draws(bnn, 1).items()}
    net = Pair()
    net.load_state_dict({name: draw[site] for name, site in bnn.parameter_sites.items()})
    assert_close(poutine.condition(bnn, draw)(*args, **kwargs), net(A, B))
    trace = poutine.trace(poutine.condition(bnn, draw)).get_trace(*args, **kwargs, y=Y)
    assert trace.nodes["obs"]["fn"].batch_shape == (N,)


@pytest.mark.parametrize("call", CALLS)
def test_mini_batches_and_predictions_of_two_inputs(call):
    args, kwargs = CALLS[call]
    bnn = apd.BNN(Pair(), prior_scale=0.5)
    mcmc = pyro.infer.MCMC(apd.SGLD(bnn, 1e-3, batch_size=6), num_samples=4, warmup_steps=1, disable_progbar=True)
    mcmc.run(*args, **kwargs, y=Y)
    assert mcmc.diagnostics()["path"] == {"chain 0": "captured"}
    draws = mcmc.get_samples()
    expected_SNK = apd.outputs(bnn, draws, (A, B)).probs_SNK
    assert_close(apd.outputs(bnn, draws, *args, **kwargs).probs_SNK, expected_SNK)
    assert apd.Predictive(bnn, posterior_samples=draws)(*args, **kwargs)["obs"].shape == (4, N)
    assert apd.log_likelihood(bnn, draws, *args, **kwargs, y=Y).shape == (4, N)


def test_every_input_is_given_the_rows_of_the_batch():
    """Each input holds the number of its row: a batch with rows of different data would be seen."""

    class Numbered(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, a, b):
            assert torch.equal(a, b)
            return a * self.scale

    number = torch.arange(float(N)).unsqueeze(1)
    bnn = apd.BNN(Numbered(), subsample_size=5)
    trace = poutine.trace(bnn).get_trace({"a": number, "b": number.clone()}, Y % 2)
    assert len(trace.nodes["obs"]["value"]) == 5
    kernel = apd.SGLD(apd.BNN(Numbered()), 1e-3, batch_size=6, capture=False)
    kernel.setup(0, {"a": number, "b": number.clone()}, Y % 2)
    kernel.sample(kernel.initial_params)


@pytest.mark.slow
def test_distillation_of_two_inputs():
    bnn = apd.BNN(Pair(), prior_scale=0.3)
    x = {"a": A, "b": B}
    mcmc = apd.MCMC(apd.SGLD(bnn, 1e-2, seed=0), num_samples=60, warmup_steps=20, disable_progbar=True)
    mcmc.run(x, Y)
    distilled = apd.distill(mcmc, num_steps=3, seed=0)
    assert distilled.metadata["space"] == "functions"
    draws = distilled.get_samples(6, seed=0)
    ensemble = distilled.ensemble(6, seed=0)
    assert_close(ensemble(x), apd.outputs(bnn, draws, x).probs_SNK.mean(0))
    assert_close(ensemble(**x), ensemble((A, B)))
    assert distilled.network()(**x).shape == (N, 4)
    table = apd.diagnostics.compare(mcmc, distilled, bnn, x, Y, seed=0)
    assert "mean_mi" in table.index


def test_many_rows_of_several_inputs_are_cut():
    bnn = apd.BNN(nn.Bilinear(3, 2, 4))
    draws = posterior_draws(bnn, 10)
    a, b = torch.randn(60_000, 3), torch.randn(60_000, 2)
    expected_SNK = apd.outputs(bnn, draws, (a[:5], b[:5])).probs_SNK
    assert_close(apd.outputs(bnn, draws, (a, b)).probs_SNK[:, :5], expected_SNK)


@pytest.mark.parametrize(
    ("args", "kwargs", "part"),
    [
        ((), {}, "got []"),
        ((3.0,), {}, "got float"),
        (({"a": A},), {"a": A}, "Inputs ['a'] are in x and"),
    ],
)
def test_inputs_that_are_none(args, kwargs, part):
    with pytest.raises(DataError) as error:
        apd.BNN(Pair())(*args, **kwargs)
    assert part in str(error.value)


def test_inputs_of_another_network():
    with pytest.raises(ModelError, match=r"net\(Tensor, c=\).*a dict as keyword"):
        apd.BNN(Pair())(A, c=B)
    with pytest.raises(ModelError, match=r"net\(a=\).*missing 1 required"):
        apd.BNN(Pair())({"a": A})
    with pytest.raises(DataError, match=f"There are {N} inputs, but targets"):
        apd.BNN(Pair())((A, B), Y[:3])


def test_what_is_remembered_of_inputs():
    plain = NetworkInputs.of(A, {"scale": 2.0})
    assert plain.is_by_row
    assert plain.form != NetworkInputs.of(A, {"scale": 3.0}).form
    assert not NetworkInputs.of(A, {"scale": torch.tensor(2.0)}).is_by_row
    assert not NetworkInputs.of(A.clone().requires_grad_(), {}).is_by_row
