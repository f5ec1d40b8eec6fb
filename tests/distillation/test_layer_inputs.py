# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import nn

import pyro_apd as apd
from pyro_apd.distillation import layer_inputs as module
from pyro_apd.distillation.layer_inputs import layer_inputs
from pyro_apd.models.layout import Layout


def found(model, *args, num_draws=2, observed="obs"):
    torch.manual_seed(0)
    trace = poutine.trace(model).get_trace(*args)
    names = [name for name, site in trace.iter_stochastic_nodes() if name not in (observed, "data")]
    layout = Layout.from_trace(trace, names)
    theta_SD = 0.3 * torch.randn(num_draws, layout.size)
    return layout, theta_SD, layer_inputs(model, layout, theta_SD, args)


def moment(inputs_NI):
    inputs_NI = torch.cat([inputs_NI, torch.ones(len(inputs_NI), 1)], 1).double()
    return inputs_NI.mT @ inputs_NI / len(inputs_NI)


def test_moments_of_a_perceptron_are_those_of_its_layers_under_each_draw():
    net = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4))
    x = torch.randn(20, 7)
    layout, theta_SD, seen = found(apd.BNN(net, likelihood="categorical"), x)
    assert sorted(seen) == ["net.0.weight", "net.2.weight"]
    first, second = seen["net.0.weight"], seen["net.2.weight"]
    assert first.matrix.entry == (0, 5, 7, 35, 0)
    assert second.matrix.entry == (40, 4, 5, 60, 0)
    torch.testing.assert_close(first.moment_II, moment(x))
    hidden = [
        torch.relu(F.linear(x, draw["net.0.weight"], draw["net.0.bias"])) for draw in map(layout.constrain, theta_SD)
    ]
    torch.testing.assert_close(second.moment_II, sum(map(moment, hidden)) / 2)


def test_inputs_of_a_convolution_are_its_patches():
    net = nn.Sequential(nn.Conv2d(2, 8, 3, stride=2, padding=1, groups=2, bias=False), nn.Flatten(), nn.Linear(72, 4))
    x = torch.randn(6, 2, 5, 5)
    _, _, seen = found(apd.BNN(net, likelihood="categorical"), x)
    one = seen["net.0.weight"]
    assert one.matrix.entry == (0, 8, 9, -1, 0)
    patches_NI = F.unfold(x, 3, padding=1, stride=2).mT.reshape(-1, 2, 9).flatten(0, 1).double()
    torch.testing.assert_close(one.moment_II, patches_NI.mT @ patches_NI / len(patches_NI))


def test_a_convolution_of_sequences_is_seen():
    net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(16, 4))
    _, _, seen = found(apd.BNN(net, likelihood="categorical"), torch.randn(5, 3, 6))
    assert seen["net.0.weight"].matrix.entry == (0, 4, 9, 36, 0)


def test_weights_of_a_model_written_by_hand_may_have_a_row_per_input():
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(7, 5), 1).to_event(2))
        v = pyro.sample("v", dist.Normal(torch.zeros(5), 1).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(torch.relu(x @ w) @ v, scale))

    x = torch.randn(9, 7)
    _, _, seen = found(model, x)
    assert list(seen) == ["w"]
    assert seen["w"].matrix.entry == (0, 5, 7, -1, 1)
    torch.testing.assert_close(seen["w"].moment_II, x.double().mT @ x.double() / 9)


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.recurrent = nn.GRU(6, 5, batch_first=True)
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)
        self.last = nn.Linear(5, 4)

    def forward(self, x):
        hidden, _ = self.recurrent(self.embedding(x))
        return self.last(self.attention(hidden, hidden, hidden)[0][:, -1])


def test_layers_of_sequences_are_seen_where_they_are_products():
    _, _, seen = found(apd.BNN(Sequences(), likelihood="categorical"), torch.randint(11, (8, 6)))
    assert {"net.attention.in_proj_weight", "net.attention.out_proj.weight", "net.last.weight"} <= set(seen)
    assert "net.embedding.weight" not in seen


def test_matrices_of_few_units_are_left_out():
    _, _, seen = found(apd.BNN(nn.Linear(6, 3), likelihood="categorical"), torch.randn(8, 6))
    assert seen == {}


def test_nothing_is_seen_where_torch_has_no_dispatch_modes(monkeypatch):
    def missing(*args):
        raise ImportError("no dispatch modes")

    monkeypatch.setattr(module, "_recorder", missing)
    _, _, seen = found(apd.BNN(nn.Linear(6, 5), likelihood="categorical"), torch.randn(8, 6))
    assert seen == {}
