# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Which parameters of a network are latent, and adapters against the same written by hand."""

import copy
import math
import pickle
import re

import pyro
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.testing import assert_close

from pyro_apd.errors import ModelError
from pyro_apd.models.bayesian_part import select
from pyro_apd.models.bnn import BNN


def mlp():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))


class Encoder(nn.Module):
    """Attention, a convolution and a linear layer."""

    def __init__(self, **attention):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        return self.out(self.conv(self.layer(x).mT).mean(-1))


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        (None, ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]),
        ("last_layer", ["4.weight", "4.bias"]),
        ("2", ["2.weight", "2.bias"]),
        ("2.weight", ["2.weight"]),
        (["0", "4.bias"], ["0.weight", "0.bias", "4.bias"]),
        ("*.bias", ["0.bias", "2.bias", "4.bias"]),
        (["last_layer", "0.bias"], ["0.bias", "4.weight", "4.bias"]),
        (lambda name, value: value.dim() == 2, ["0.weight", "2.weight", "4.weight"]),
    ],
)
def test_what_is_latent(spec, names):
    bnn = BNN(mlp(), bayesian=spec)
    assert list(bnn.priors) == [f"net.{name}" for name in names]
    assert list(bnn.parameter_sites) == names


def test_parameters_without_gradients_are_latent_only_by_name():
    net = mlp()
    net[0].requires_grad_(False)
    assert "0.weight" not in BNN(net).parameter_sites
    assert list(BNN(net, bayesian="0").parameter_sites) == ["0.weight", "0.bias"]
    net.requires_grad_(False)
    assert list(BNN(net, bayesian="last_layer").parameter_sites) == ["4.weight", "4.bias"]
    with pytest.raises(ModelError, match="bayesian='last_layer'"):
        BNN(net)


def test_the_rest_keeps_its_values():
    net = mlp()
    bnn = BNN(net, bayesian="last_layer")
    x = torch.randn(7, 3)
    draw = {"net.4.weight": torch.randn(4, 6), "net.4.bias": torch.randn(4)}
    expected = nn.functional.linear(net[:4](x), draw["net.4.weight"], draw["net.4.bias"])
    assert_close(poutine.condition(bnn, draw)(x), expected)


def test_a_shared_parameter_is_latent_by_any_name():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    assert BNN(net, bayesian="last_layer").parameter_sites == {
        "0.weight": "net.0.weight",
        "1.weight": "net.0.weight",
        "1.bias": "net.1.bias",
    }


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        (3, "bayesian=3"),
        ([], "bayesian=[]"),
        ([3], "bayesian=[3]"),
        ("5", "matches no parameter; there are ['0.weight'"),
        ("lora:", "positive rank"),
        ("lora:0", "positive rank"),
        ("lora:x:2", "positive rank"),
        ("lora:2:5", "['5'] has no linear layer"),
        ("lora:9:2", "larger than the layer"),
        (["lora:2", "lora:1:2"], "two adapters"),
    ],
)
def test_what_is_no_part(spec, part):
    with pytest.raises(ValueError, match=re.escape(part)):
        BNN(mlp(), bayesian=spec)


def test_a_last_layer_that_is_not_linear_is_refused():
    with pytest.raises(ModelError, match=r"'2', LayerNorm, not a linear.*linear layers are \['0'\]"):
        BNN(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4)), bayesian="last_layer")
    with pytest.raises(ModelError, match="no parameters"):
        BNN(nn.Sequential(nn.Tanh()), bayesian="last_layer")
    with pytest.raises(ModelError, match="nothing to put a prior on"):
        BNN(mlp(), bayesian=lambda name, value: False)
    assert len(BNN(nn.Linear(3, 4), bayesian="last_layer").priors) == 2


def test_integers_are_not_latent():
    net = mlp()
    net[0].weight = nn.Parameter(torch.zeros(5, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"'0.weight' is torch.int8"):
        BNN(net, bayesian="0.weight")


def test_adapters_of_every_layer():
    part = select(Encoder(), "lora:2")
    found = {a.name: (a.parameter, a.start, a.units, a.fan_in) for a in part.adapters}
    assert found == {
        "conv": ("conv.weight", 0, 6, 24),
        "layer.linear1": ("layer.linear1.weight", 0, 16, 8),
        "layer.linear2": ("layer.linear2.weight", 0, 8, 16),
        "layer.self_attn.query": ("layer.self_attn.in_proj_weight", 0, 8, 8),
        "layer.self_attn.key": ("layer.self_attn.in_proj_weight", 8, 8, 8),
        "layer.self_attn.value": ("layer.self_attn.in_proj_weight", 16, 8, 8),
        "layer.self_attn.out_proj": ("layer.self_attn.out_proj.weight", 0, 8, 8),
        "out": ("out.weight", 0, 4, 6),
    }


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("lora:2:query,value", ["layer.self_attn.query", "layer.self_attn.value"]),
        ("lora:3:layer.linear1", ["layer.linear1"]),
        ("lora:1:layer.self_attn.*", ["query", "key", "value", "out_proj"]),
        ("lora:5:out_proj", ["layer.self_attn.out_proj"]),
    ],
)
def test_adapters_of_some_layers(spec, names):
    part = select(Encoder(), spec)
    assert [a.name.endswith(name) for a, name in zip(part.adapters, names, strict=True)] == [True] * len(names)
    assert {a.rank for a in part.adapters} == {int(spec[5])}
    assert not part.names


def test_a_layer_has_one_kind_of_latents():
    """A layer that is latent as a whole has no adapter, and a parameter of two layers has one."""
    part = select(mlp(), ["lora:1", "2.weight"])
    assert [adapter.name for adapter in part.adapters] == ["0", "4"]
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    part = select(net, "lora:1")
    assert [adapter.name for adapter in part.adapters] == ["0"]
    assert part.adapted == {"0.weight": "0.weight", "2.weight": "0.weight"}
    bnn = BNN(net, bayesian="lora:1")
    draw = {name: prior.sample() for name, prior in bnn.priors.items()}
    weight = net[0].weight.detach() + draw["net.0.lora_B"] @ draw["net.0.lora_A"]
    x = torch.randn(3, 4)
    hidden = nn.functional.linear(x, weight, net[0].bias).tanh()
    expected = nn.functional.linear(hidden, weight, net[2].bias)
    assert_close(poutine.condition(bnn, draw)(x), expected.detach())


def test_adapters_of_projections_of_other_widths():
    net = nn.MultiheadAttention(8, 2, kdim=5, vdim=6)
    found = {a.name: (a.parameter, a.start, a.units, a.fan_in) for a in select(net, "lora:1:key,value").adapters}
    assert found == {"key": ("k_proj_weight", 0, 8, 5), "value": ("v_proj_weight", 0, 8, 6)}


@pytest.mark.parametrize("with_grad", [True, False], ids=["with gradients", "fast path"])
def test_every_use_of_a_weight_is_adapted(with_grad):
    """Against a copy of the network with the products added by hand; without gradients torch has fast paths."""
    net = Encoder().eval()
    bnn = BNN(net, bayesian=["lora:2", "layer.norm1"])
    draw = {name: prior.sample() for name, prior in bnn.priors.items()}
    by_hand = copy.deepcopy(net)
    products = {name: draw[f"net.{name}.lora_B"] @ draw[f"net.{name}.lora_A"] for name in PLACES}
    with torch.no_grad():
        for name, place in PLACES.items():
            weight = place(by_hand)
            weight += products[name].reshape(weight.shape)
        by_hand.layer.norm1.weight.copy_(draw["net.layer.norm1.weight"])
        by_hand.layer.norm1.bias.copy_(draw["net.layer.norm1.bias"])
    x = torch.randn(5, 7, 8)
    with torch.set_grad_enabled(with_grad):
        assert_close(poutine.condition(bnn, draw)(x), by_hand(x), rtol=1e-4, atol=1e-5)


PLACES = {
    "conv": lambda net: net.conv.weight,
    "layer.linear1": lambda net: net.layer.linear1.weight,
    "layer.linear2": lambda net: net.layer.linear2.weight,
    "layer.self_attn.query": lambda net: net.layer.self_attn.in_proj_weight[:8],
    "layer.self_attn.key": lambda net: net.layer.self_attn.in_proj_weight[8:16],
    "layer.self_attn.value": lambda net: net.layer.self_attn.in_proj_weight[16:],
    "layer.self_attn.out_proj": lambda net: net.layer.self_attn.out_proj.weight,
    "out": lambda net: net.out.weight,
}


def test_adapters_start_at_the_network_and_can_leave():
    net, x = Encoder().eval(), torch.randn(5, 7, 8)
    bnn = BNN(net, bayesian="lora:2:value,out")
    values = bnn.network_values
    assert_close(poutine.condition(bnn, values)(x), net(x))
    leaves = {name: value.requires_grad_() for name, value in values.items()}
    poutine.condition(bnn, leaves)(x).square().sum().backward()
    assert all(leaves[f"net.{name}.lora_B"].grad.abs().max() > 0 for name in ("layer.self_attn.value", "out"))


def test_prior_of_an_adapter_is_of_the_change_of_a_unit():
    """For inputs of root mean square 1 the output of a unit changes with the standard deviation given, at any rank."""
    net = nn.Sequential(nn.Linear(50, 200))
    for rank in (1, 8):
        bnn = BNN(net, bayesian=f"lora:{rank}", prior_scale={"0": 0.3})
        a, b = (bnn.priors[f"net.0.lora_{letter}"] for letter in "AB")
        assert_close(a.stddev, torch.full((rank, 50), 1 / math.sqrt(50)))
        assert_close(b.stddev, torch.full((200, rank), 0.3 / math.sqrt(rank)))
        change_SU = torch.stack([b.sample() @ a.sample() @ torch.ones(50) for _ in range(400)])
        assert change_SU.std() == pytest.approx(0.3, rel=0.1)
    assert_close(
        BNN(net, bayesian="lora:4", prior_scale="fan_in").priors["net.0.lora_B"].stddev[0, 0], torch.tensor(0.5)
    )
    with pytest.raises(ValueError, match="how much it may change"):
        BNN(net, bayesian="lora:1", prior_scale=pyro.distributions.Normal(0.0, 1.0))


def test_it_can_be_pickled_moved_and_copied():
    bnn = BNN(Encoder(), bayesian="lora:2:query")
    x = torch.randn(2, 3, 8)
    draw = {name: prior.sample() for name, prior in bnn.priors.items()}
    expected = poutine.condition(bnn, draw)(x)
    for other in (pickle.loads(pickle.dumps(bnn)), copy.deepcopy(bnn)):
        assert_close(poutine.condition(other, draw)(x), expected)
    doubled = poutine.condition(bnn.double(), {name: value.double() for name, value in draw.items()})(x.double())
    assert_close(doubled, expected.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "module"), [("last_layer", "4"), ("*.bias", ""), ("4.bias", "4"), (["0", "2"], ""), ("lora:2:2", "2")]
)
def test_the_module_that_holds_all_latents(spec, module):
    assert select(mlp(), spec).module() == module
