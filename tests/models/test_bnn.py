# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""`BNN`: the joint density against the same written by hand, and the arguments, outputs and targets that it refuses."""

import copy
import io
import logging
import pickle

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import nn
from torch.testing import assert_close

from pyro_apd.errors import DataError, ModelError
from pyro_apd.kernels import SGLD
from pyro_apd.models.bnn import BNN
from pyro_apd.predictive.predictive import Predictive, log_likelihood, outputs

N, D = 6, 3


def mlp(out=4):
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, out))


@pytest.fixture
def x():
    return torch.randn(N, D)


def draw(model, *args):
    """One draw of the latents from the prior."""
    trace = poutine.trace(model).get_trace(*args)
    return {name: site["value"] for name, site in trace.iter_stochastic_nodes() if name in model.priors}


def joint(model, values, *args):
    trace = poutine.trace(poutine.condition(model, values)).get_trace(*args)
    return trace, trace.log_prob_sum()


def by_hand(values, x):
    hidden = (x @ values["net.0.weight"].T + values["net.0.bias"]).tanh()
    return hidden @ values["net.2.weight"].T + values["net.2.bias"]


LIKELIHOODS = {
    "categorical": (4, {}, torch.tensor([0, 3, 2, 2, 1, 0]), lambda out, s: dist.Categorical(logits=out)),
    "bernoulli": (1, {}, torch.tensor([0, 1, 1, 0, 1, 0]), lambda out, s: dist.Bernoulli(logits=out.squeeze(-1))),
    "bernoulli, several": (2, {}, torch.ones(N, 2).bool(), lambda out, s: dist.Bernoulli(logits=out).to_event(1)),
    "gaussian": (1, {}, torch.linspace(-1, 1, N), lambda out, s: dist.Normal(out.squeeze(-1), s)),
    "gaussian, column": (1, {}, torch.linspace(-1, 1, N).unsqueeze(-1), lambda out, s: dist.Normal(out.squeeze(-1), s)),
    "gaussian, several": (2, {}, torch.randn(N, 2), lambda out, s: dist.Normal(out, s).to_event(1)),
    "gaussian, integers": (1, {}, torch.arange(N), lambda out, s: dist.Normal(out.squeeze(-1), s)),
    "gaussian, fixed": (1, {"noise_scale": 0.1}, torch.randn(N), lambda out, s: dist.Normal(out.squeeze(-1), 0.1)),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_joint_density(name, x):
    num_outputs, kwargs, y, likelihood = LIKELIHOODS[name]
    model = BNN(mlp(num_outputs), name.partition(",")[0], prior_scale=0.7, **kwargs)
    values = draw(model, x, y)
    assert list(values) == ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"] + ["noise_scale"] * (
        "gaussian" in name and not kwargs
    )
    trace, log_joint = joint(model, values, x, y)
    expected = sum(dist.Normal(0.0, 0.7).log_prob(values[n]).sum() for n in values if n != "noise_scale")
    if "noise_scale" in values:
        expected += dist.HalfCauchy(1.0).log_prob(values["noise_scale"])
    out = by_hand(values, x)
    fn = likelihood(out, values.get("noise_scale"))
    y = y.squeeze(-1) if name == "gaussian, column" else y
    expected += fn.log_prob(y.to(out.dtype) if y.dtype == torch.bool or "categorical" not in name else y).sum()
    assert_close(log_joint, expected)
    assert_close(trace.nodes["_RETURN"]["value"], out.squeeze(-1))
    assert [frame.name for frame in trace.nodes["obs"]["cond_indep_stack"]] == ["data"]
    assert trace.nodes["obs"]["fn"].batch_shape == (N,)


def test_a_network_with_one_number_for_each_datum(x):
    model = BNN(nn.Sequential(nn.Linear(D, 1), nn.Flatten(0)), "gaussian")
    assert model(x).shape == (N,)
    assert Predictive(model, num_samples=3)(x)["obs"].shape == (3, N)


def test_the_users_network_is_left_alone(x):
    net = mlp().train()
    before = copy.deepcopy(net.state_dict())
    model = BNN(net)
    model(x)
    model.double()
    assert net.training
    assert type(net[0]) is nn.Linear
    assert all(isinstance(parameter, nn.Parameter) and parameter.requires_grad for parameter in net.parameters())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    assert not list(model.parameters())


# Networks


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(4, 4, bias=False)
        self.decode = nn.Linear(4, 4, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(self.encode(x))


def test_a_parameter_used_twice_is_one_latent():
    model, x = BNN(Tied()), torch.randn(N, 4)
    assert list(model.priors) == ["net.encode.weight"]
    values = draw(model, x)
    weight = values["net.encode.weight"]
    assert_close(poutine.condition(model, values)(x), x @ weight.T @ weight.T)


def test_parameters_without_gradients_are_constants(x):
    net = mlp()
    net[0].requires_grad_(False)
    model = BNN(net)
    assert list(model.priors) == ["net.2.weight", "net.2.bias"]
    values = draw(model, x)
    hidden = net[0](x).tanh()
    assert_close(poutine.condition(model, values)(x), hidden @ values["net.2.weight"].T + values["net.2.bias"])


class LastStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(2, 4, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0][:, -1]


NETWORKS = {
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)),
        (1, 6, 6),
    ),
    "lstm": (LastStep, (5, 2)),
    "attention": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(12, 3)),
        (3, 4),
    ),
    "norms": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.BatchNorm1d(6), nn.Dropout(0.9), nn.Linear(6, 3)),
        (4,),
    ),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (4,)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(6, 3)), None),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_of_every_network_is_random_and_nothing_else(name):
    make, shape = NETWORKS[name]
    net = make()
    x = torch.randint(7, (N, 2)) if shape is None else torch.randn(N, *shape)
    model = BNN(net, prior_scale=0.5)
    assert set(model.priors) == {f"net.{name}" for name, _ in net.named_parameters()}
    values = draw(model, x)
    conditioned = poutine.condition(model, values)
    first = conditioned(x)
    model.train()  # as a training loop may do
    assert torch.equal(conditioned(x), first)
    net.eval().load_state_dict({**net.state_dict(), **{n.removeprefix("net."): v for n, v in values.items()}})
    assert_close(conditioned(x), net(x))
    leaves = {n: v.clone().requires_grad_() for n, v in values.items()}
    y = torch.zeros(N, dtype=torch.long)
    grads = torch.autograd.grad(joint(model, leaves, x, y)[1], list(leaves.values()))
    prior_grads = {n: -v / 0.25 for n, v in values.items()}
    for (site, expected), grad in zip(prior_grads.items(), grads, strict=True):
        # The likelihood must move every parameter, but for those whose effect a softmax or a norm takes away.
        if not torch.allclose(grad, expected, atol=1e-6):
            continue
        assert "norm" in site or "bias" in site, site
    draws = {n: torch.stack([v, v + 0.1]) for n, v in values.items()}
    assert_close(outputs(model, draws, x).probs_SNK[0], net(x).softmax(-1))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_layers_that_behave_otherwise_in_training_are_named(batch_norm, caplog):
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3) if batch_norm else nn.Dropout(0.5))
    with caplog.at_level(logging.WARNING, logger="pyro_apd"):
        BNN(net)
    assert ("Batch normalisation layers ['1']" if batch_norm else "Dropout layers ['1']") in caplog.text


def test_batch_normalisation_that_saw_no_data_is_told_from_one_that_did(caplog):
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    net[1](torch.randn(8, 3))
    with caplog.at_level(logging.WARNING, logger="pyro_apd"):
        BNN(net)
    fresh, trained = (record.getMessage() for record in caplog.records)
    assert fresh.startswith("Batch normalisation layers ['3']")
    assert "have seen no data yet" in fresh
    assert "batch_norm='group'" in fresh
    assert trained == "Batch normalisation layers ['1'] use their running statistics as constants."


def test_group_normalisation_in_place_of_batch_normalisation(caplog):
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
    x = torch.randn(N, 1, 5, 5)
    with caplog.at_level(logging.WARNING, logger="pyro_apd"):
        model = BNN(net, batch_norm="group")
    assert not caplog.records
    assert set(model.priors) == {f"net.{name}" for name, _ in net.named_parameters()}
    assert isinstance(net[1], nn.BatchNorm2d), "the network given was changed"
    values = draw(model, x)
    conditioned = poutine.condition(model, values)
    assert_close(conditioned(x)[:2], conditioned(x[:2]))  # no datum depends on its neighbours


def test_inference_can_start_at_the_network(x):
    net = mlp()
    bnn = BNN(net, likelihood="gaussian")
    start = bnn.init_to_network
    kernel = SGLD(bnn, 1e-12, seed=0, init_strategy=pickle.loads(pickle.dumps(start)))
    y = net(x).detach()
    mcmc = pyro.infer.MCMC(kernel, 1, 0, disable_progbar=True)
    mcmc.run(x, y)
    drawn = mcmc.get_samples()
    for name, parameter in net.named_parameters():
        assert_close(drawn[f"net.{name}"][0], parameter.detach(), atol=1e-4, rtol=0)
    assert drawn["noise_scale"] > 0
    guide = pyro.infer.autoguide.AutoDelta(bnn, init_loc_fn=start)
    assert_close(guide(x, y)["net.0.weight"], net[0].weight)
    pyro.clear_param_store()


def test_batch_norm_must_be_known():
    with pytest.raises(ValueError, match=r"batch_norm='batch' must be one of 'constant', 'group'"):
        BNN(nn.Linear(2, 2), batch_norm="batch")


# Pyro's tools


def test_predictive_agrees_with_pyro(x):
    model = BNN(mlp(1), "gaussian")
    draws = [draw(model, x) for _ in range(4)]
    draws = {name: torch.stack([d[name] for d in draws]) for name in draws[0]}
    for return_sites in [("_RETURN",), ("noise_scale", "net.0.weight")]:
        ours = Predictive(model, draws, return_sites=return_sites)(x)
        theirs = pyro.infer.Predictive(model, draws, return_sites=return_sites)(x)
        for name in theirs:
            assert_close(ours[name], theirs[name])
    result = outputs(model, draws, x)
    assert result.kind == "normal"
    assert_close(result.variance_SN, (draws["noise_scale"] ** 2).unsqueeze(-1).expand(4, N))
    y = torch.randn(N, 1)
    assert_close(
        log_likelihood(model, draws, x, y),
        dist.Normal(result.mean_SN, result.variance_SN.sqrt()).log_prob(y.squeeze(-1)),
    )


@pytest.mark.slow
def test_full_batch_nuts():
    """Conjugate: one weight, unit prior, known noise."""
    x = torch.linspace(-1, 1, 20).unsqueeze(-1)
    y = 0.8 * x.squeeze(-1) + 0.1 * torch.randn(20)
    model = BNN(nn.Linear(1, 1, bias=False), "gaussian", noise_scale=0.3)
    mcmc = pyro.infer.MCMC(pyro.infer.NUTS(model), num_samples=400, warmup_steps=100, disable_progbar=True)
    mcmc.run(x, y)
    weight = mcmc.get_samples()["net.weight"].flatten()
    precision = 1 + x.square().sum() / 0.3**2
    assert_close(weight.mean(), (x.squeeze(-1) @ y) / 0.3**2 / precision, atol=0.03, rtol=0)
    assert_close(weight.std(), precision.rsqrt(), atol=0.03, rtol=0)


def test_its_own_minibatches_are_unbiased_and_off_in_prediction(x):
    y = torch.arange(N) % 4
    full, model = BNN(mlp()), BNN(mlp(), subsample_size=2)
    values = draw(full, x, y)
    exact = joint(full, values, x, y)[1]
    estimates = torch.stack([joint(model, values, x, y)[1] for _ in range(600)])
    assert len(estimates.unique()) > 10
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / 600**0.5
    trace, estimate = joint(model, {**values, "data": torch.tensor([1, 4])}, x, y)
    rows = joint(full, values, x[[1, 4]], y[[1, 4]])[0].nodes["obs"]
    prior = sum(model.priors[name].log_prob(value) for name, value in values.items())
    assert_close(estimate, prior + 3 * rows["log_prob_sum"])
    assert trace.nodes["obs"]["scale"] == 3
    assert model(x).shape == (N, 4)
    draws = {name: value.unsqueeze(0) for name, value in values.items()}
    assert Predictive(model, draws)(x)["obs"].shape == (1, N)
    assert_close(log_likelihood(model, draws, x, y).sum(), exact - prior)
    assert_close(joint(BNN(mlp(), subsample_size=100), values, x, y)[1], exact)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_pickles_and_copies(x, likelihood):
    model = BNN(mlp(), likelihood, prior_scale={"0": dist.Laplace(0.0, 1.0), "2": "fan_in"}, subsample_size=2)
    values = draw(model, x)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert list(twin.priors) == list(model.priors)
        assert_close(poutine.condition(twin, values)(x), poutine.condition(model, values)(x))
        for name, prior in twin.priors.items():
            assert_close(prior.log_prob(values[name]), model.priors[name].log_prob(values[name]))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert buffer.tell() > 0


def test_dtype_follows_the_network(x):
    kwargs = {"likelihood": "gaussian", "noise_prior": dist.LogNormal(0.0, 1.0)}
    models = [
        BNN(mlp(1).double(), prior_scale=prior, **kwargs).to(dtype)
        for prior in (1.0, "fan_in", dist.Laplace(0.0, 1.0))
        for dtype in (torch.float64, None)
    ]
    for model in [*models, BNN(mlp(1), **kwargs).double()]:
        values = draw(model, x.double())
        assert {value.dtype for value in values.values()} == {torch.float64}
        assert model(x.double()).dtype == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_follows_the_network(x):
    for model in (BNN(mlp(1).cuda(), "gaussian"), BNN(mlp(1), "gaussian", subsample_size=2).cuda()):
        values = draw(model, x.cuda())
        assert {value.device.type for value in values.values()} == {"cuda"}
        assert joint(model, values, x.cuda(), torch.randn(N).cuda())[1].is_cuda


def test_nothing_is_left_in_the_parameter_store(x):
    model = BNN(mlp())
    model(x)
    assert not list(pyro.get_param_store().keys())
    assert "categorical" in repr(model)


# Errors


@pytest.mark.parametrize(
    ("net", "kwargs", "error", "match"),
    [
        (mlp, {"likelihood": "probit"}, ValueError, r"likelihood='probit' must be one of 'categorical', "),
        (mlp, {"subsample_size": 0}, ValueError, "subsample_size=0 must be a positive integer"),
        (mlp, {"noise_scale": 0.1}, ValueError, r"noise_scale=0.1 belongs to likelihood='gaussian'.*'categorical'"),
        (lambda: len, {}, ValueError, "net must be a torch.nn.Module; got builtin_function"),
        (lambda: PyroModule[nn.Linear](2, 2), {}, ValueError, "a PyroModule"),
        (lambda: BNN(mlp()), {}, ValueError, "a PyroModule"),
        (lambda: nn.LazyLinear(2), {}, ModelError, "call it once"),
        (nn.ReLU, {}, ModelError, "nothing to put a prior on"),
        (lambda: mlp().requires_grad_(False), {}, ModelError, "nothing to put a prior on"),
        (
            lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)),
            {},
            ModelError,
            r"Layers \['1'\].*GroupNorm",
        ),
    ],
)
def test_bad_arguments(net, kwargs, error, match):
    net = net()
    with pytest.raises(error, match=match):
        BNN(net, **kwargs)


@pytest.mark.parametrize(
    ("likelihood", "num_outputs", "y", "match"),
    [
        ("categorical", 4, torch.ones(N), r"integer dtype; got torch.float32. Use y.long\(\)"),
        ("categorical", 4, torch.eye(4)[:1].repeat(N, 1), r"one-hot rows: y.argmax\(-1\)"),
        ("categorical", 4, torch.ones(N, 1).long(), r"shape \(N,\); got \(6, 1\). Use y.squeeze"),
        ("categorical", 4, torch.ones(N, 4).long(), r"shape \(N,\); got \(6, 4\). Use y.argmax"),
        ("categorical", 4, torch.tensor([1, 2, 3, 4, 1, 2]), r"classes 0 to 3.*got 1 to 4. .*y - 1"),
        ("categorical", 4, torch.full((N,), -1), "got -1 to -1"),
        ("categorical", 4, torch.zeros(N - 1).long(), r"6 inputs, but targets of shape \(5,\)"),
        ("categorical", 4, [0] * N, r"must be a tensor; got list. Use torch.as_tensor"),
        ("bernoulli", 1, torch.full((N,), 2), "needs targets 0 and 1"),
        ("bernoulli", 1, torch.full((N,), torch.nan), "needs targets 0 and 1"),
        ("bernoulli", 1, torch.ones(N, 2), r"shape \(6,\), as the network's outputs; got \(6, 2\)"),
        ("gaussian", 1, torch.ones(N, N), r"shape \(6,\), as the network's outputs; got \(6, 6\)"),
        ("gaussian", 2, torch.ones(N), r"shape \(6, 2\), as the network's outputs; got \(6,\)"),
        ("gaussian", 1, torch.tensor(1.0), r"6 inputs, but targets of shape \(\)"),
    ],
)
def test_bad_targets(likelihood, num_outputs, y, match, x):
    with pytest.raises(DataError, match=match):
        BNN(mlp(num_outputs), likelihood)(x, y)


def test_bad_targets_of_a_minibatch(x):
    model = BNN(mlp(4), subsample_size=3)
    for y, match in [(torch.full((N,), 4), "got 4 to 4"), (torch.ones(N), "integer dtype"), ([0] * N, "got list")]:
        with pytest.raises(DataError, match=match):
            model(x, y)


def test_values_are_not_looked_at_without_validation(x):
    """So that a step on a GPU need not wait."""
    with pyro.validation_enabled(False):
        assert BNN(mlp(1), "bernoulli")(x, torch.full((N,), 2)) is not None
        assert BNN(mlp(4))(x, torch.full((N,), 9)).shape == (N, 4)


@pytest.mark.parametrize(
    ("likelihood", "net", "match"),
    [
        ("categorical", nn.Linear(D, 1), r"needs logits of shape \(6, K\).*likelihood='bernoulli'"),
        ("categorical", nn.Sequential(nn.Linear(D, 1), nn.Flatten(0)), r"needs logits of shape \(6, K\)"),
        ("gaussian", nn.Sequential(nn.Linear(D, 2), nn.Flatten(0)), r"one row for each of 6 inputs; it gives \(12,\)"),
        ("gaussian", nn.LSTM(D, 2), "one row for each of 6 inputs; it gives tuple"),
    ],
)
def test_bad_outputs(likelihood, net, match, x):
    with pytest.raises(ModelError, match=match):
        BNN(net, likelihood)(x)
