# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""`Predictive` against Pyro's own, run draw by draw, on models of every kind that a user may bring."""

import functools
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, autoguide
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import am_i_wrapped
from torch import nn

from pyro_apd import uncertainty
from pyro_apd.generators import Generator
from pyro_apd.models.layout import Layout, is_subsample
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.predictive.predictive import Predictive, function_values, log_likelihood, outputs
from pyro_apd.predictive.reductions import reduce_outputs

S, N = 7, 5


def bayesian(net):
    """Normal priors on every parameter of a network, in place."""
    to_pyro_module_(net)
    for module in list(net.modules()):
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, PyroSample(dist.Normal(torch.zeros(value.shape), 1.0).to_event(value.dim())))
    return net


class Classifier(PyroModule):
    def __init__(self, net=None):
        super().__init__()
        self.net = bayesian(net or nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 6)))

    def forward(self, x, y=None):
        logits = self.net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)
        pyro.deterministic("probs", logits.softmax(-1))
        return logits


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = bayesian(nn.Linear(3, 1))
        self.noise = PyroSample(dist.HalfCauchy(1.0))

    def forward(self, x, y=None):
        mean = self.net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(mean, self.noise), obs=y)


def hierarchical(x, y=None):
    """Plates on latents, a deterministic site, a factor, a tensor returned; no network."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 3, dim=-2):
        offset = pyro.sample("offset", dist.Normal(mu, 1.0))
        scale = pyro.sample("scale", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("data", len(x), dim=-1):
            mean = pyro.deterministic("mean", offset + x * scale[..., 0], event_dim=0)
            pyro.sample("obs", dist.Normal(mean, 0.1), obs=y)
    pyro.deterministic("total", mean.sum())
    pyro.factor("penalty", -(mu**2))
    return mean


def subsampled(x, y=None):
    """A plate that shows two rows at a time."""
    slope = pyro.sample("slope", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x), subsample_size=2) as rows:
        pyro.sample("obs", dist.Normal(x[rows] @ slope, 1.0), obs=None if y is None else y[rows])


def null(x):
    """No latents: only what is observed, and noise."""
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x[:, 0], 1.0))
    return x.sum()


def conv():
    return Classifier(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 6)))


MODELS = {
    "classifier": (Classifier, lambda: torch.randn(N, 3)),
    "regression": (Regression, lambda: torch.randn(N, 3)),
    "conv": (conv, lambda: torch.randn(N, 1, 6, 6)),
    "hierarchical": (lambda: hierarchical, lambda: torch.randn(N)),
    "subsampled": (lambda: subsampled, lambda: torch.randn(N, 3)),
}
RANDOM = {"obs"}


def prior_draws(model, *args):
    """Independent draws of the latents, with the shapes that the model itself gives them."""
    rows = []
    for _ in range(S):
        trace = poutine.trace(model).get_trace(*args)
        rows.append({n: s["value"] for n, s in trace.iter_stochastic_nodes() if n != "obs" and not is_subsample(s)})
    return {name: torch.stack([row[name] for row in rows]).detach() for name in rows[0]}


@pytest.fixture(params=MODELS, name="case")
def _case(request):
    make, data = MODELS[request.param]
    model, x = make(), data()
    draws = prior_draws(model, x)
    pyro.get_param_store().clear()
    return model, x, draws


@pytest.fixture
def one_pass(caplog):
    """Fails if anything was evaluated draw by draw."""
    with caplog.at_level(logging.WARNING, logger="pyro_apd"):
        yield
        assert "one by one" not in " ".join(record.getMessage() for record in caplog.get_records("call"))


def assert_same(ours, theirs, random=RANDOM):
    assert list(ours) == list(theirs)
    for name in theirs:
        assert ours[name].shape == theirs[name].shape, name
        assert ours[name].dtype == theirs[name].dtype, name
        assert ours[name].device == theirs[name].device, name
        assert not ours[name].requires_grad, name
        if name not in random:
            torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "return_sites", [(), None, ("_RETURN",), ["obs", "no such site"], {"obs", "mu", "net.0.weight"}]
)
def test_equals_pyro(case, return_sites, one_pass):
    model, x, draws = case
    if return_sites == ("_RETURN",) and model is subsampled:
        pytest.skip("it returns nothing")
    theirs = pyro.infer.Predictive(model, draws, return_sites=return_sites)(x)
    pyro.get_param_store().clear()
    random = {"obs", "_RETURN"} if isinstance(model, Regression) else RANDOM
    assert_same(Predictive(model, draws, return_sites=return_sites)(x), theirs, random)


def test_equals_pyro_with_targets(case, one_pass):
    model, x, draws = case
    if model is hierarchical:
        y = torch.randn(3, N)
    else:
        y = torch.arange(N) if isinstance(model, Classifier) else torch.randn(N)
    theirs = pyro.infer.Predictive(model, draws)(x, y)
    random = {"obs"} if model is subsampled else set()
    ours = Predictive(model, draws)(x, y)
    assert_same(ours, theirs, random)
    ours["obs"].zero_()  # a result is the caller's to write to
    assert y.any()


@pytest.mark.parametrize("chunk_size", [1, 3, S, 100])
def test_chunks_change_nothing(case, chunk_size, one_pass):
    model, x, draws = case
    whole = Predictive(model, draws, return_sites=None)(x)
    random = {"obs"}
    assert_same(Predictive(model, draws, return_sites=None, chunk_size=chunk_size)(x), whole, random)


def test_observations_have_the_models_distribution(one_pass):
    model, x = Regression(), torch.randn(2, 3)
    weight, bias = torch.randn(1, 1, 3), torch.randn(1, 1)
    draws = {"net.weight": weight, "net.bias": bias, "noise": torch.tensor([0.5])}
    draws = {name: value.expand(20_000, *value.shape[1:]) for name, value in draws.items()}
    obs = Predictive(model, draws)(x)["obs"]
    assert len(obs.unique()) > 30_000
    torch.testing.assert_close(obs.mean(0), (x @ weight[0, 0] + bias[0]), atol=0.02, rtol=0)
    torch.testing.assert_close(obs.std(0), torch.full((2,), 0.5), atol=0.02, rtol=0)


def test_classes_have_the_models_distribution(one_pass):
    def model():
        with pyro.plate("data", 2):
            return pyro.sample("obs", dist.Categorical(torch.tensor([[0.2, 0.3, 0.5], [0.0, 1.0, 0.0]])))

    obs = Predictive(model, num_samples=20_000)()["obs"]
    frequency = torch.stack([(obs == k).double().mean(0) for k in range(3)], -1)
    torch.testing.assert_close(frequency[0], torch.tensor([0.2, 0.3, 0.5]).double(), atol=0.02, rtol=0)
    assert (obs[:, 1] == 1).all()


@pytest.mark.parametrize("return_sites", [(), None, ("_RETURN", "obs")])
def test_null_model(return_sites, one_pass):
    x = torch.randn(N, 3)
    theirs = pyro.infer.Predictive(null, num_samples=S, return_sites=return_sites)(x)
    ours = Predictive(null, num_samples=S, return_sites=return_sites)(x)
    assert_same(ours, theirs)
    assert len(ours["obs"].unique()) == S * N


def test_prior_predictive_draws_every_latent_anew(one_pass):
    model, x = Classifier(), torch.randn(N, 3)
    ours = Predictive(model, num_samples=S)(x)
    theirs = pyro.infer.Predictive(model, num_samples=S)(x)
    assert_same(ours, theirs, random=set(theirs))
    assert len(ours["net.0.weight"].unique()) == S * 12


SAMPLERS = {
    "laplace": dist.Laplace(1.0, 2.0),
    "student-t": dist.StudentT(8.0, 1.0, 2.0),
    "half-cauchy": dist.HalfCauchy(1.0),
    "exponential": dist.Exponential(2.0),
    "multivariate normal": dist.MultivariateNormal(torch.ones(2), torch.eye(2)),
    "low-rank normal": dist.LowRankMultivariateNormal(torch.ones(2), torch.ones(2, 1), torch.ones(2)),
    "log-normal": dist.LogNormal(0.0, 1.0),
    "uniform": dist.Uniform(-1.0, 2.0),
    "gamma": dist.Gamma(2.0, 3.0),
    "poisson": dist.Poisson(30.0),
    "mixture": dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([0.0, 5.0]), 1.0)),
    # These are drawn one by one.
    "beta": dist.Beta(2.0, 3.0),
    "dirichlet": dist.Dirichlet(torch.tensor([1.0, 2.0])),
    "multinomial": dist.Multinomial(50, torch.tensor([0.3, 0.7])),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_independently(name, caplog):
    fn = SAMPLERS[name]

    def model():
        with pyro.plate("data", 3):
            pyro.sample("obs", fn)

    with caplog.at_level(logging.WARNING, logger="pyro_apd"):
        obs = Predictive(model, num_samples=2000)()["obs"]
    assert ("one by one" in caplog.text) == (name in ("beta", "dirichlet", "multinomial"))
    assert obs.shape == (2000, 3, *fn.event_shape)
    assert len(obs.unique(dim=0)) > 1000
    quantiles = torch.tensor([0.25, 0.5, 0.75])
    expected = fn.expand([6000]).sample().quantile(quantiles, dim=0)
    spread = (expected[2] - expected[0]).max()
    torch.testing.assert_close(obs.flatten(0, 1).quantile(quantiles, dim=0), expected, atol=0.1 * spread, rtol=0)
    ranks = obs.flatten(2)[..., 0].argsort(0).argsort(0) if fn.event_shape else obs.argsort(0).argsort(0)
    assert (torch.corrcoef(ranks.double().T) - torch.eye(3)).abs().max() < 0.1, "data under one draw are correlated"


def test_the_same_seed_gives_the_same_samples(case):
    model, x, draws = case
    results = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        results.append(Predictive(model, draws)(x))
    assert_same(results[0], results[1], random=())


# Guides


def handwritten(x, y=None):
    loc = pyro.param("loc", lambda: torch.randn(4, 3))
    pyro.sample("_noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    pyro.sample("net.0.weight", dist.Normal(loc, 0.1).to_event(2))
    pyro.deterministic("net.0.bias", torch.full((4,), 2.0))
    pyro.sample("net.2.weight", dist.Delta(torch.ones(6, 4), event_dim=2))
    pyro.sample("net.2.bias", dist.Normal(torch.zeros(6), 0.1).to_event(1))


@pytest.mark.parametrize("return_sites", [(), None, ("obs", "net.0.weight"), ("_RETURN",)])
def test_handwritten_guide(return_sites, one_pass):
    model, x = Classifier(), torch.randn(N, 3)
    theirs = pyro.infer.Predictive(model, guide=handwritten, num_samples=S, return_sites=return_sites)(x)
    ours = Predictive(model, guide=handwritten, num_samples=S, return_sites=return_sites)(x)
    assert_same(ours, theirs, random=set(theirs) - {"net.0.bias", "net.2.weight"})
    if "net.0.weight" in ours:
        assert len(ours["net.0.weight"].unique()) == S * 12
    pyro.get_param_store().clear()


def test_guide_parameters_made_on_the_way_are_one_for_all_draws():
    model, x = Classifier(), torch.randn(N, 3)
    weight = Predictive(model, guide=handwritten, num_samples=2000)(x)["net.0.weight"]
    torch.testing.assert_close(weight.std(0), torch.full((1, 4, 3), 0.1), atol=0.01, rtol=0)
    assert not list(pyro.get_param_store().keys())


@pytest.mark.parametrize("kind", [autoguide.AutoNormal, autoguide.AutoMultivariateNormal, autoguide.AutoDelta])
def test_autoguide_of_a_network_with_a_data_plate(kind, one_pass):
    model, x = Classifier(), torch.randn(N, 3)
    guide = kind(poutine.block(model, hide=["obs", "probs"]))
    ours = Predictive(model, guide=guide, num_samples=S)(x)
    shapes = {name: tuple(value.shape) for name, value in ours.items()}
    # Pyro pads latents for the plate of the data, which its own call then cannot give to nn.Linear.
    assert shapes == {
        "net.0.weight": (S, 1, 4, 3),
        "net.0.bias": (S, 1, 4),
        "net.2.weight": (S, 1, 6, 4),
        "net.2.bias": (S, 1, 6),
        "obs": (S, N),
        "probs": (S, 1, N, 6),
    }
    torch.testing.assert_close(
        ours["probs"].squeeze(1),
        torch.stack(
            [
                ((x @ w.T + b).tanh() @ v.T + c).softmax(-1)
                for w, b, v, c in zip(*(ours[n].squeeze(1) for n in list(shapes)[:4]), strict=True)
            ]
        ),
    )
    pyro.get_param_store().clear()


def test_autoguide_of_plated_latents(one_pass):
    x = torch.randn(N)
    guide = autoguide.AutoNormal(poutine.block(hierarchical, expose=["mu", "offset", "scale"]))
    guide(x)
    theirs = pyro.infer.Predictive(hierarchical, guide=guide, num_samples=S)(x)
    assert_same(Predictive(hierarchical, guide=guide, num_samples=S)(x), theirs, random=set(theirs))
    pyro.get_param_store().clear()


class _Distilled:
    """What a distilled posterior offers, as far as it matters here."""

    def __init__(self, draws):
        self.layout = Layout.from_draws(draws)
        self._draws = draws
        self.calls = []

    def __call__(self, *args, **kwargs):
        raise AssertionError("the guide call is the slow way")

    def get_samples(self, num_samples=None):
        self.calls.append(num_samples)
        return {name: value[:num_samples] for name, value in self._draws.items()}


def test_distilled_posterior_draws_all_at_once(case):
    model, x, draws = case
    if model is subsampled:
        return
    posterior = _Distilled({name: value.requires_grad_() for name, value in draws.items()})
    ours = Predictive(model, guide=posterior, num_samples=S - 1)(x)
    assert posterior.calls == [S - 1]
    cut = {name: value.detach()[:-1] for name, value in draws.items()}
    assert_same(ours, pyro.infer.Predictive(model, cut, return_sites=None)(x))


# What vmap cannot do


def test_data_dependent_control_flow_is_run_one_by_one(caplog):
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z > 0:
            z = z * 100
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(z, 1.0))
        return x * z

    draws, x = {"z": torch.tensor([-1.0, 1.0, 2.0])}, torch.ones(2)
    with caplog.at_level(logging.WARNING, logger="pyro_apd"):
        value = Predictive(model, draws, return_sites=("_RETURN",))(x)["_RETURN"]
    assert value[:, 0].tolist() == [-1.0, 100.0, 200.0]
    assert "Evaluating draws one by one" in caplog.text
    assert "data-dependent control flow" in caplog.text


@pytest.mark.parametrize("function", [outputs, Predictive], ids=["outputs", "Predictive"])
@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("call", [2, 3])
def test_an_error_that_a_model_raises_once_is_not_hidden(function, branches, call, caplog):
    """Of the vectorised attempt, which comes after a trial run; and of the first draw where that is of no use."""
    calls = []

    def model(x):
        calls.append(x)
        if len(calls) == call:
            raise RuntimeError("a fault of my own")
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if branches and z > 0:
            z = 2 * z
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(z, 1.0))

    draws, x = {"z": torch.tensor([-1.0, 1.0, 2.0])}, torch.ones(2)
    run = functools.partial(*((Predictive(model, draws),) if function is Predictive else (outputs, model, draws)), x)
    if call == 3 and not branches:
        run()  # two calls
    with pytest.raises(RuntimeError, match="a fault of my own") as caught:
        run()
    assert caught.traceback[-1].name == "model"
    assert "one by one" not in caplog.text


def test_structure_that_varies_raises_as_in_pyro():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1e-3))
        pyro.deterministic("a" if z < 1 else "b", z)

    with pytest.raises(KeyError, match="'a'"):
        Predictive(model, {"z": torch.tensor([0.0, 2.0])})()


def test_invalid_parameters_raise_although_vmap_runs_unvalidated():
    def model(x):
        scale = pyro.sample("scale", dist.Normal(1.0, 0.01))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x, scale).mask(True).to_event(0))

    draws = {"scale": torch.tensor([1.0, 2.0, -1.0])}
    with pytest.raises(ValueError, match="scale"):
        Predictive(model, draws)(torch.zeros(2))
    with pytest.raises(ValueError, match="logits"):
        Predictive(classifier := Classifier(), prior_draws(classifier, torch.zeros(2, 3)))(
            torch.full((2, 3), torch.nan)
        )


def test_outer_handlers_see_what_pyro_shows_them():
    model, x = Regression(), torch.randn(N, 3)
    draws = prior_draws(model, x)
    with poutine.condition(data={"obs": torch.arange(5.0)}):
        ours = Predictive(model, draws)(x)
    assert (ours["obs"] == torch.arange(5.0)).all()
    seen = {}
    for predictive in (Predictive, pyro.infer.Predictive):
        with _Record() as record:
            predictive(model, draws)(x)
        seen[predictive] = record.names
    assert seen[Predictive] == seen[pyro.infer.Predictive]
    assert len(seen[Predictive]) > S


class _Record(Messenger):
    def __init__(self):
        self.names = []

    def _pyro_sample(self, msg):
        self.names.append(msg["name"])


def test_parallel_is_pyros_own():
    x = torch.randn(N)
    draws = {"mu": torch.randn(S), "offset": torch.randn(S, 3, 1), "scale": torch.rand(S, 3, 1, 2)}
    theirs = pyro.infer.Predictive(hierarchical, draws, parallel=True)(x)
    assert_same(Predictive(hierarchical, draws, parallel=True)(x), theirs)


def test_call_is_pyros_own():
    model, x = Classifier(), torch.randn(N, 3)
    draws = prior_draws(model, x)
    obs, probs = Predictive(model, draws).call(x)
    assert obs.shape == (S, N)
    assert probs.shape == (S, 1, N, 6)


# Global state


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("validate", [False, True])
def test_global_state_is_left_alone(fails, validate):
    class Mixed(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 1)
            self.w = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self, x):
            if fails and not torch.is_grad_enabled():
                raise RuntimeError("the model's own")
            pyro.param("mine", torch.zeros(1))
            return pyro.deterministic("out", self.net(x) * self.w)

    model, x, draws = Mixed(), torch.randn(N, 3), {"w": torch.randn(S)}
    to_pyro_module_(model)
    pyro.param("theirs", torch.ones(1))
    with pyro.validation_enabled(validate):
        if fails:
            with pytest.raises(RuntimeError, match="the model's own"):
                Predictive(model, draws)(x)
        else:
            Predictive(model, draws)(x)
        assert dist.is_validation_enabled() == validate
    assert list(pyro.get_param_store().keys()) == ["theirs"]
    pyro.get_param_store().clear()
    assert torch.is_grad_enabled()
    assert not poutine.runtime.am_i_wrapped()


def test_model_is_as_before_after_a_call():
    model, x = Classifier(), torch.randn(N, 3)
    before = set(poutine.trace(model).get_trace(x).nodes)
    Predictive(model, prior_draws(model, x))(x)
    assert set(poutine.trace(model).get_trace(x).nodes) == before


# Bad input


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({}, "Either posterior_samples or num_samples"),
        ({"posterior_samples": {}}, "No sample sites"),
        ({"posterior_samples": {"a": torch.ones(2), "b": torch.ones(3)}}, r"different numbers.*'a': 2, 'b': 3"),
        ({"posterior_samples": {"a": torch.ones(0, 2)}}, "zero draws"),
        ({"posterior_samples": {"a": torch.tensor(1.0)}}, r"\['a'\].*first dimension.*shape \(\)"),
        ({"posterior_samples": {"a": [1.0]}}, "got list"),
        ({"posterior_samples": [torch.ones(1)]}, "dict of tensors"),
        ({"num_samples": 0}, "num_samples=0 must be a positive integer"),
        ({"num_samples": -3}, "num_samples=-3 must be a positive integer"),
        ({"num_samples": 2, "chunk_size": 0}, "chunk_size=0 must be a positive integer"),
        ({"num_samples": 2, "chunk_size": 2.0}, "chunk_size=2.0 must be a positive integer"),
        ({"num_samples": 2, "return_sites": "_RETURN"}, "return_sites.*tuple.*'_RETURN'"),
        ({"posterior_samples": {"a": torch.ones(2)}, "guide": null}, "cannot be provided with the `guide`"),
        ({"posterior_samples": MCMC(NUTS(null), 1)}, r"posterior_samples.*got MCMC.*get_samples\(\) returns"),
        ({"guide": {"a": torch.ones(2)}, "num_samples": 2}, "guide.*got dict.*posterior_samples="),
        ({"num_samples": 2.5}, "num_samples=2.5 must be a positive integer"),
        ({"num_samples": 2, "return_sites": [5]}, r"return_sites.*got \[5\]"),
        ({"num_samples": 2, "parallel": "yes"}, "parallel='yes' must be True or False"),
        ({"num_samples": 2, "reduce": 5}, "reduce.*list of names; got 5"),
        ({"guide": null}, "Either posterior_samples or num_samples"),
    ],
)
def test_bad_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        Predictive(null, **kwargs)


def test_a_model_that_is_none():
    with pytest.raises(ValueError, match=r"`model` must be a Pyro model.*got dict"):
        Predictive({"a": torch.ones(2)}, null)


def test_disagreement_with_num_samples_warns_as_in_pyro():
    with pytest.warns(UserWarning, match="Defaulting to 2"):
        predictive = Predictive(null, {"a": torch.ones(2)}, num_samples=3)
    assert predictive(torch.ones(1, 3))["obs"].shape == (2, 1)


def test_a_result_is_the_callers_to_write_to():
    draws = {"mu": torch.ones(S), "offset": torch.ones(S, 3, 1), "scale": torch.full((S, 3, 1, 2), 0.5)}
    x = torch.randn(N)
    for value in Predictive(hierarchical, draws, return_sites=None)(x).values():
        value.zero_()
    assert (draws["offset"] == 1).all()
    assert (x != 0).all()


def test_a_return_value_that_is_no_tensor():
    with pytest.raises(ValueError, match=r"'_RETURN'.*NoneType.*pyro.deterministic"):
        Predictive(subsampled, num_samples=2, return_sites=("_RETURN",))(torch.ones(4, 3))


# Averages while draws pass by


class _Affine(Generator):
    """Draws ``0.5 * latent``, and keeps account of how many at a time."""

    def __init__(self, size):
        super().__init__()
        self.output_size = self.latent_size = size
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.made = []

    @property
    def config(self):
        return {"kind": "affine"}

    def forward(self, latent):
        self.made.append(len(latent))
        return self.scale * latent


def _distilled(model, x):
    trace = poutine.trace(model).get_trace(x)
    layout = Layout.from_trace(trace, [name for name in trace.stochastic_nodes if name not in ("obs", "data")])
    return DistilledPosterior(layout, _Affine(layout.size))


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_scores_by_reduction_are_those_of_all_draws(chunk_size):
    model, x = Classifier(), torch.randn(N, 3)
    posterior = _distilled(model, x)
    names = ("mean_probability", "mutual_information", "variation_ratio")
    draws = posterior.get_samples(11, seed=1)
    posterior.stream = functools.partial(posterior.stream, seed=1)
    scores = Predictive(model, guide=posterior, num_samples=11, reduce=names, chunk_size=chunk_size)(x)
    probs_SNK = outputs(model, draws, x).probs_SNK
    assert tuple(scores) == names
    torch.testing.assert_close(scores["mean_probability"], probs_SNK.mean(0))
    torch.testing.assert_close(scores["mutual_information"], uncertainty.mutual_information(probs_SNK))
    torch.testing.assert_close(scores["variation_ratio"], uncertainty.variation_ratio(probs_SNK))
    again = Predictive(model, draws, reduce="mutual_information")(x)
    torch.testing.assert_close(again["mutual_information"], scores["mutual_information"])


def test_networks_are_made_a_chunk_at_a_time():
    model, x = Classifier(), torch.randn(N, 3)
    posterior = _distilled(model, x)
    Predictive(model, guide=posterior, num_samples=50, chunk_size=4, reduce="mean_probability")(x)
    assert max(posterior.generator.made) == 4
    probs_SNK = outputs(model, posterior.stream(50, seed=2), x, chunk_size=4).probs_SNK
    assert max(posterior.generator.made) == 4
    torch.testing.assert_close(probs_SNK, outputs(model, posterior.get_samples(50, seed=2), x).probs_SNK)


def test_latents_of_a_streamed_guide_are_returned():
    model, x = Classifier(), torch.randn(N, 3)
    posterior = _distilled(model, x)
    values = Predictive(model, guide=posterior, num_samples=6, chunk_size=4)(x)
    assert values["net.0.weight"].shape == (6, 1, 4, 3)
    assert len(values["net.0.weight"].flatten(1).unique(dim=0)) == 6
    assert values["obs"].shape == (6, N)
    assert set(Predictive(model, guide=posterior, num_samples=6, return_sites=("obs",))(x)) == {"obs"}


def test_moments_by_reduction():
    model, x = Regression(), torch.randn(N, 3)
    draws = _distilled(model, x).get_samples(9)
    got = Predictive(model, draws, reduce=("mean", "variance"))(x)
    both = outputs(model, draws, x)
    torch.testing.assert_close(got["mean"], both.mean_SN.mean(0))
    torch.testing.assert_close(got["variance"], both.variance_SN.mean(0) + both.mean_SN.var(0, correction=0))


def test_bernoulli_by_reduction():
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=x @ w))

    draws, x = {"w": torch.randn(9, 3)}, torch.randn(N, 3)
    got = reduce_outputs(model, draws, x, names=["mean_probability", "expected_entropy"])
    probs_SNK = outputs(model, draws, x).probs_SNK
    torch.testing.assert_close(got["mean_probability"], probs_SNK.mean(0))
    torch.testing.assert_close(got["expected_entropy"], uncertainty.expected_entropy(probs_SNK))


def test_reductions_that_cannot_be():
    model, x = Regression(), torch.randn(N, 3)
    draws = _distilled(model, x).get_samples(3)
    with pytest.raises(ValueError, match=r"`reduce` must name some of mean_probability.*got \['entropy'\]"):
        Predictive(model, draws, reduce="entropy")
    with pytest.raises(ValueError, match="must name some of mean, variance"):
        Predictive(model, draws, reduce="mutual_information")(x)
    with pytest.raises(ValueError, match="leave `return_sites` and `parallel` out"):
        Predictive(model, draws, reduce="mean", return_sites=("obs",))
    with pytest.raises(ValueError, match="needs posterior_samples or a guide"):
        Predictive(model, num_samples=3, reduce="mean")(x)


def test_models_run_in_one_thread_at_a_time():
    inside = []

    def model(x, y=None):
        inside.append(None)
        alone = len(inside) == 1
        try:
            time.sleep(0.001)
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Normal(x @ w + 1.0 * alone, 1.0), obs=y)
        finally:
            inside.pop()
        return (x @ w).sum() + 1.0 * alone

    draws = {"w": torch.randn(3, 3)}
    x = torch.randn(6, 3)
    calls = {
        "Predictive": lambda: Predictive(model, draws, return_sites=("_RETURN",))(x)["_RETURN"],
        "reduce": lambda: Predictive(model, draws, reduce="mean")(x)["mean"],
        "outputs": lambda: outputs(model, draws, x).mean_SN,
        "function_values": lambda: function_values(model, draws, x),
        "log_likelihood": lambda: log_likelihood(model, draws, x, x[:, 0]),
    }
    expected = {name: call() for name, call in calls.items()}
    with ThreadPoolExecutor(5) as pool:
        futures = {name: [pool.submit(call) for _ in range(3)] for name, call in calls.items()}
        found = {name: [future.result() for future in several] for name, several in futures.items()}
    assert all(torch.allclose(value, expected[name]) for name, several in found.items() for value in several)
    assert not am_i_wrapped()
    assert dist.is_validation_enabled()
