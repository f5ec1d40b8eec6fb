# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Networks that end in probabilities are refused where the likelihood takes logits, and no others."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from pyro_apd.errors import ModelError
from pyro_apd.models.bnn import BNN
from pyro_apd.models.building import build_potential

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, num_outputs, last):
        super().__init__()
        self.linear = nn.Linear(3, num_outputs)
        self.last = last

    def forward(self, x):
        return self.last(self.linear(x))


@pytest.mark.parametrize(
    ("likelihood", "last", "layer"),
    [
        ("categorical", nn.Softmax(-1), "net[1], is Softmax"),
        ("categorical", nn.Sigmoid(), "net[1], is Sigmoid"),
        ("bernoulli", nn.Sigmoid(), "net[1], is Sigmoid"),
        ("bernoulli", nn.LogSigmoid(), "net[1], is LogSigmoid"),
        ("bernoulli", nn.LogSoftmax(-1), "net[1], is LogSoftmax"),
        ("categorical", nn.Sequential(nn.ReLU(), nn.Softmax(-1), nn.Identity()), "net[1][1], is Softmax"),
    ],
)
def test_a_last_layer_of_probabilities_is_refused(likelihood, last, layer):
    with pytest.raises(ModelError) as error:
        BNN(nn.Sequential(nn.Linear(3, 2), last), likelihood=likelihood)
    assert layer in str(error.value)
    assert "Leave that out" in str(error.value)


@pytest.mark.parametrize(
    ("likelihood", "num_outputs", "last"),
    [
        ("categorical", 2, nn.Softmax(-1)),
        ("categorical", 2, lambda f: functional.softmax(f, -1)),
        ("bernoulli", 1, lambda f: torch.sigmoid(f).squeeze(-1)),
        ("bernoulli", 1, functional.logsigmoid),
    ],
)
def test_a_forward_that_ends_in_probabilities_is_refused(likelihood, num_outputs, last):
    bnn = BNN(Net(num_outputs, last), likelihood=likelihood)
    with pytest.raises(ModelError, match=r"the last operation of its forward.. is (Softmax|Sigmoid|LogSigmoid)"):
        build_potential(bnn, (X, torch.arange(8) % 2), {})


@pytest.mark.parametrize(
    ("likelihood", "num_outputs", "last"),
    [
        ("categorical", 2, nn.LogSoftmax(-1)),
        ("categorical", 2, lambda f: 3 * torch.sigmoid(f)),
        ("bernoulli", 1, nn.Tanh()),
        ("gaussian", 1, nn.Sigmoid()),
    ],
)
def test_other_last_layers_are_taken(likelihood, num_outputs, last):
    bnn = BNN(Net(num_outputs, last), likelihood=likelihood)
    assert build_potential(bnn, (X, torch.arange(8) % 2), {})[0].num_data == 8
    net = nn.Sequential(nn.Linear(3, 2), nn.Softmax(-1), nn.Linear(2, 2))
    assert BNN(net).parameter_sites
