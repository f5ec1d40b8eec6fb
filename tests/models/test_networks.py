# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Drawn weights in plain networks."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.testing import assert_close

import pyro_apd as apd
from pyro_apd.generators import PaperGenerator
from pyro_apd.models.layout import Layout
from pyro_apd.models.networks import Ensemble
from pyro_apd.posterior.posterior import DistilledPosterior

X = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))


def architecture(outputs=3):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))


def posterior(prefix="net.", **extra):
    sites = {f"{prefix}{n}": tuple(p.shape) for n, p in architecture().named_parameters()}
    layout = Layout({**sites, **extra})
    return DistilledPosterior(layout, PaperGenerator(layout.size, 3, 8))


@pytest.mark.parametrize("prefix", ["", "net.", "a.b."])
def test_a_plain_network_computes_what_the_draw_computes(prefix):
    distilled = posterior(prefix)
    draw = distilled.sample()
    net = distilled.network(draw, net=architecture())
    first, second = ((draw[f"{prefix}{i}.weight"], draw[f"{prefix}{i}.bias"]) for i in (0, 2))
    assert_close(net(X), torch.tanh(X @ first[0].T + first[1]) @ second[0].T + second[1])
    assert type(net) is nn.Sequential
    assert len(list(net.parameters())) == 4
    assert not net.training
    assert set(net.state_dict()) == set(architecture().state_dict())


def test_of_a_bnn():
    bnn = apd.BNN(architecture())
    distilled = posterior()
    draw = distilled.sample()
    net = distilled.bind(bnn).network(draw)
    logits = apd.Predictive(bnn, {n: v.unsqueeze(0) for n, v in draw.items()}, return_sites=("_RETURN",))(X)["_RETURN"]
    assert_close(net(X), logits[0])
    assert len(list(net.parameters())) == 4
    assert list(bnn.net.parameters()) == []
    exported = torch.export.export(net, (X,)).module()
    assert_close(exported(X), net(X))


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    layout = Layout({"net.a.weight": (4, 4)})
    distilled = DistilledPosterior(layout, PaperGenerator(16, 3, 4))
    draw = distilled.sample()
    w = draw["net.a.weight"]
    for source in (Tied(), apd.BNN(Tied())):
        net = distilled.network(draw, net=source)
        assert net.a.weight is net.b.weight
        assert_close(net(X), torch.tanh(X @ w.T) @ w.T)


def test_parameters_that_are_not_latent_keep_their_values():
    net = architecture()
    net[0].requires_grad_(False)
    layout = Layout({"net.2.weight": (3, 5), "net.2.bias": (3,)})
    distilled = DistilledPosterior(layout, PaperGenerator(layout.size, 3, 4))
    assert torch.equal(distilled.network(net=net)[0].weight, net[0].weight)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_an_ensemble_averages_and_has_gradients(chunk_size):
    distilled = posterior().bind(apd.BNN(architecture()))
    ensemble = distilled.ensemble(5, seed=3, chunk_size=chunk_size)
    draws = distilled.get_samples(5, seed=3)
    nets = [distilled.network({n: v[s] for n, v in draws.items()}) for s in range(5)]
    x = X.clone().requires_grad_()
    expected = torch.stack([net(x).softmax(-1) for net in nets]).mean(0)
    assert_close(ensemble(x), expected)
    (ours,) = torch.autograd.grad(ensemble(x)[:, 0].sum(), x)
    (theirs,) = torch.autograd.grad(expected[:, 0].sum(), x)
    assert_close(ours, theirs)
    assert not [p for p in ensemble.parameters() if p.requires_grad]
    assert ensemble.to(torch.float64)(X.double()).dtype == torch.float64
    assert_close(distilled.ensemble(5, seed=3, link="identity")(X), torch.stack([net(X) for net in nets]).mean(0))


class Recurrent(nn.Module):
    """A GRU, which :func:`torch.vmap` cannot run."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.GRU(2, 3, batch_first=True)
        self.readout = nn.Linear(3, 2)

    def forward(self, x):
        return self.readout(self.recurrent(x)[0][:, -1])


def test_an_ensemble_of_networks_that_cannot_be_evaluated_together(caplog):
    model = apd.BNN(Recurrent())
    layout = Layout({f"net.{name}": tuple(value.shape) for name, value in Recurrent().named_parameters()})
    distilled = DistilledPosterior(layout, PaperGenerator(layout.size, 3, 8)).bind(model)
    x = torch.randn(4, 5, 2)
    draws = distilled.get_samples(3, seed=1)
    nets = [distilled.network({n: v[s] for n, v in draws.items()}) for s in range(3)]
    ensemble = distilled.ensemble(3, seed=1)
    for _ in range(2):
        assert_close(ensemble(x), torch.stack([net(x).softmax(-1) for net in nets]).mean(0))
    assert caplog.text.count("one by one") == 1


def test_what_has_no_network():
    distilled = posterior()
    with pytest.raises(ValueError, match=r"Pass net=.*posterior.bind"):
        distilled.network()
    with pytest.raises(ValueError, match="must be one draw"):
        distilled.network(distilled.get_samples(2), net=architecture())
    with pytest.raises(ValueError, match=r"'2.weight' has shape \(4, 5\), site 'net.2.weight' is of shape \(3, 5\)"):
        distilled.bind(architecture(4))
    with pytest.raises(ValueError, match="are not the sites"):
        distilled.bind(nn.Sequential(nn.Linear(4, 5), nn.PReLU()))
    with pytest.raises(ValueError, match="no trainable parameters"):
        distilled.bind(nn.ReLU())
    with pytest.raises(ValueError, match=r"link=.* must be one of 'softmax'"):
        distilled.ensemble(3, net=architecture())
    pyro_module = PyroModule[nn.Linear](4, 3)
    pyro_module.weight = PyroSample(dist.Normal(torch.zeros(3, 4), 1.0).to_event(2))
    for wrong in (pyro_module, "net"):
        with pytest.raises(ValueError, match="without PyroModules"):
            distilled.bind(wrong)


class Meeting(nn.Module):
    """Waits until two threads are inside; one then goes on, and the other when that one is done."""

    both, one_is_done = threading.Barrier(2), threading.Event()

    def forward(self, x):
        if self.both.wait(timeout=30):
            self.one_is_done.wait(timeout=30)
        return x


def test_an_ensemble_in_two_threads_at_once():
    Meeting.one_is_done.clear()
    net = nn.Sequential(Meeting(), architecture(), nn.BatchNorm1d(3))
    draws = {n: torch.randn(4, *p.shape) for n, p in net.named_parameters()}
    layout = Layout({n: tuple(p.shape) for n, p in net.named_parameters()})
    ensemble = Ensemble(net, layout, draws, link="identity")
    inputs = [X, X + 1.0]
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(ensemble, x) for x in inputs]
        for future in found:
            future.add_done_callback(lambda _: Meeting.one_is_done.set())
    net[0] = nn.Identity()
    for x, mean in zip(inputs, found, strict=True):
        each = [torch.func.functional_call(net.eval(), {n: v[s] for n, v in draws.items()}, (x,)) for s in range(4)]
        assert_close(mean.result(), torch.stack(each).mean(0))
    assert len(ensemble._copies._idle) == 2


def test_an_ensemble_stays_in_evaluation_mode_and_moves_with_its_copies():
    net = nn.Sequential(architecture(), nn.BatchNorm1d(3), nn.Dropout())
    layout = Layout({n: tuple(p.shape) for n, p in net.named_parameters()})
    draws = {n: torch.randn(4, *p.shape) for n, p in net.named_parameters()}
    ensemble = Ensemble(net, layout, draws, link="identity").train()
    mean = ensemble(X)
    assert ensemble.training
    for other in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):
        assert torch.equal(other(X), mean)
    assert_close(ensemble.double()(X.double()).float(), mean)
