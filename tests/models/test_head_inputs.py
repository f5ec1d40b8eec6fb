# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Inputs of the layer that holds all latents."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_apd.errors import ModelError
from pyro_apd.models.bnn import BNN

X = torch.randn(23, 3, generator=torch.Generator().manual_seed(0))


def body():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh())


class Net(nn.Module):
    """A body and a head, joined in some way."""

    def __init__(self, join):
        super().__init__()
        self.body, self.head, self.join = body(), nn.Linear(5, 4), join

    def forward(self, x):
        return self.join(self.body(x), self.head)


@pytest.mark.parametrize("batch_size", [4, 23, 100])
def test_features_are_what_the_last_layer_is_given(batch_size):
    net = Net(lambda h, head: head(h))
    bnn = BNN(net, bayesian="last_layer")
    features = bnn.features(X, batch_size=batch_size)
    assert_close(features, net.body(X).detach())
    assert_close(bnn.features((X,)), features)
    assert not features.requires_grad


@pytest.mark.parametrize(
    ("join", "part"),
    [
        (lambda h, head: head(h) + 1, "are not those of the network"),
        (lambda h, head: head(head(h)[:, :1].expand(-1, 5)), "is called 2 times"),
        (lambda h, head: h[:, :4], "is called 0 times"),
        (lambda h, head: head(h[0]).expand(len(h), 4), "does not take one tensor with a row"),
        (lambda h, head: head(h - h.mean(0)), "depend on the other data"),
    ],
    ids=["changed after it", "twice", "never", "without rows", "of all rows"],
)
def test_networks_without_features(join, part):
    with pytest.raises(ModelError, match=part):
        BNN(Net(join), bayesian="head").features(X)


def test_latents_in_several_layers_have_no_features():
    with pytest.raises(ModelError, match="not within one layer"):
        BNN(Net(lambda h, head: head(h)), bayesian=["body.0", "head"]).features(X)


@pytest.mark.parametrize("batch_size", [0, 2.5])
def test_batch_size(batch_size):
    with pytest.raises(ValueError, match="batch_size"):
        BNN(body(), bayesian="0").features(X, batch_size=batch_size)
