# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""`outputs`, `function_values`, `log_likelihood`: against the same written by hand, for every way to write a model."""

import logging
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn
from torch.testing import assert_close

from pyro_apd import BNN, uncertainty
from pyro_apd.errors import ModelError
from pyro_apd.predictive.predictive import FunctionView, function_values, log_likelihood, outputs
from pyro_apd.predictive.vmap_draws import Footprint
from pyro_apd.runtime import vectorisation

S, N, D = 4, 7, 3


@pytest.fixture(autouse=True)
def evaluation(caplog):
    """Fails if draws were evaluated one by one, unless the test expects it."""
    vectorisation._KNOWN.clear()  # some models are in several tests
    expected = SimpleNamespace(one_by_one=False)
    with caplog.at_level(logging.WARNING, logger="pyro_apd"):
        yield expected
        log = " ".join(record.getMessage() for record in caplog.get_records("call"))
        assert ("one by one" in log) == expected.one_by_one, log


@pytest.fixture
def x():
    return torch.randn(N, D)


@pytest.fixture
def draws():
    return {"w": torch.randn(S, D), "sd": torch.rand(S) + 0.5}


def latents():
    w = pyro.sample("w", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    return w, pyro.sample("sd", dist.HalfCauchy(1.0))


class Network(PyroModule):
    def __init__(self, classes=5):
        super().__init__()
        net = nn.Sequential(nn.Linear(D, classes))
        to_pyro_module_(net)
        net[0].weight = PyroSample(dist.Normal(torch.zeros(classes, D), 1.0).to_event(2))
        net[0].bias = PyroSample(dist.Normal(torch.zeros(classes), 1.0).to_event(1))
        self.net = net

    def forward(self, x, y=None):
        logits = self.net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)


# Every kind of observation. By hand: features of the function (S, N, F) and log-likelihoods (S, N).


def test_categorical_network(x):
    model, y = Network(), torch.arange(N) % 5
    draws = {"net.0.weight": torch.randn(S, 5, D), "net.0.bias": torch.randn(S, 5)}
    logits_SNK = torch.einsum("nd,skd->snk", x, draws["net.0.weight"]) + draws["net.0.bias"].unsqueeze(1)
    for args in [(x,), (x, y)]:  # targets make no difference
        result = outputs(model, draws, *args)
        assert (result.kind, result.site) == ("categorical", "obs")
        assert (result.mean_SN, result.variance_SN) == (None, None)
        assert_close(result.probs_SNK, logits_SNK.softmax(-1))
        assert_close(function_values(model, draws, *args), logits_SNK.log_softmax(-1))
    expected = logits_SNK.log_softmax(-1).gather(-1, y.expand(S, N).unsqueeze(-1)).squeeze(-1)
    assert_close(log_likelihood(model, draws, x, y), expected)
    assert_close(log_likelihood(model, draws, x, y=y), expected)


def test_one_hot(x):
    def model(x, y=None):
        w, _ = latents()
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.OneHotCategorical(logits=x * w), obs=y)

    draws = {"w": torch.randn(S, D), "sd": torch.ones(S)}
    logits = (x * draws["w"].unsqueeze(1)).log_softmax(-1)
    assert_close(outputs(model, draws, x).probs_SNK, logits.exp())
    assert_close(function_values(model, draws, x), logits)
    assert_close(
        log_likelihood(model, draws, x, torch.eye(3)[torch.arange(N) % 3]), logits[:, range(N), [0, 1, 2] * 2 + [0]]
    )


@pytest.mark.parametrize("given", ["logits", "probs"])
@pytest.mark.parametrize("event", [0, 1])
def test_bernoulli(x, draws, given, event):
    def model(x, y=None):
        w, _ = latents()
        logits = (x @ w).unsqueeze(-1) if event else x @ w
        fn = dist.Bernoulli(**{given: logits if given == "logits" else logits.sigmoid()}).to_event(event)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", fn, obs=y)

    logits = draws["w"] @ x.T
    result = outputs(model, draws, x)
    assert result.kind == "bernoulli"
    assert_close(result.probs_SNK, torch.stack([1 - logits.sigmoid(), logits.sigmoid()], -1))
    assert_close(function_values(model, draws, x), logits.unsqueeze(-1), atol=1e-4, rtol=1e-4)
    y = (torch.arange(N) % 2).float()
    expected = torch.where(y == 1, logits, -logits)
    expected = nn.functional.logsigmoid(expected)
    assert_close(log_likelihood(model, draws, x, y.unsqueeze(-1) if event else y), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("wrap", ["plain", "event", "mask", "handler", "no plate"])
def test_normal(x, draws, wrap):
    keep = torch.arange(N) % 3 > 0

    def model(x, y=None):
        w, sd = latents()
        fn = dist.Normal(x @ w, sd)
        if wrap == "no plate":
            return pyro.sample("obs", fn.to_event(1), obs=y)
        if wrap == "event":
            fn = dist.Normal((x @ w).unsqueeze(-1).expand(N, 2), sd).to_event(1)
        if wrap == "mask":
            fn = fn.mask(keep)
        with pyro.plate("data", len(x)), poutine.mask(mask=keep if wrap == "handler" else True):
            return pyro.sample("obs", fn, obs=y)

    times = 2 if wrap == "event" else 1
    mean_SN = (draws["w"] @ x.T).repeat_interleave(times, dim=1)
    sd_SN = draws["sd"].unsqueeze(-1).expand(S, N * times)
    result = outputs(model, draws, x)
    assert (result.kind, result.probs_SNK) == ("normal", None)
    assert_close(result.mean_SN, mean_SN)
    assert_close(result.variance_SN, sd_SN**2)
    assert_close(function_values(model, draws, x), torch.stack([mean_SN, sd_SN.log()], -1))

    y = torch.randn(N, 2) if wrap == "event" else torch.randn(N)
    expected = dist.Normal(mean_SN, sd_SN).log_prob(y.flatten())
    if wrap == "event":
        expected = expected.reshape(S, N, 2).sum(-1)
    if wrap == "no plate":
        expected = expected.sum(-1, keepdim=True)
    if wrap in ("mask", "handler"):
        expected = expected * keep
    assert_close(log_likelihood(model, draws, x, y), expected)


@pytest.mark.parametrize(
    ("fn", "observe"),
    [
        (lambda mean, sd: dist.Poisson(mean.exp()), lambda n: torch.arange(float(n))),
        (lambda mean, sd: dist.Gamma(mean.exp(), sd), lambda n: torch.rand(n)),
        (lambda mean, sd: dist.StudentT(5.0, mean, sd), torch.randn),
        (lambda mean, sd: dist.LogNormal(mean, sd / 5), torch.rand),
    ],
    ids=["poisson", "gamma", "student", "log-normal"],
)
def test_other_observations_have_moments_and_are_never_sampled(x, draws, fn, observe):
    finished = []

    def model(x, y=None):
        w, sd = latents()
        with pyro.plate("data", len(x)):
            pyro.sample("obs", fn(x @ w, sd), obs=y)
        finished.append(True)

    by_hand = fn(draws["w"] @ x.T, draws["sd"].unsqueeze(-1))
    result = outputs(model, draws, x)
    assert result.kind == "other"
    assert_close(result.mean_SN, by_hand.mean.expand(S, N))
    assert_close(result.variance_SN, by_hand.variance.expand(S, N))
    assert len(finished) == 1, "only the prototype runs past the observed site"
    expected = torch.stack(torch.broadcast_tensors(by_hand.mean, 0.5 * by_hand.variance.log()), -1)
    assert_close(function_values(model, draws, x), expected)
    y = observe(N)
    assert_close(log_likelihood(model, draws, x, y), by_hand.log_prob(y))


def test_multivariate_normal_is_flattened(draws):
    def model(y=None):
        w, sd = latents()
        with pyro.plate("data", 2):
            pyro.sample("obs", dist.MultivariateNormal(w, sd**2 * torch.eye(D)), obs=y)

    result = outputs(model, draws)
    assert_close(result.mean_SN, draws["w"].repeat(1, 2))
    assert_close(result.variance_SN, (draws["sd"] ** 2).unsqueeze(-1).expand(S, 2 * D))
    y = torch.randn(2, D)
    expected = dist.Normal(draws["w"].unsqueeze(1), draws["sd"].reshape(S, 1, 1)).log_prob(y).sum(-1)
    assert_close(log_likelihood(model, draws, y), expected)


def test_no_moments(x, draws):
    def model(x, y=None):
        w, sd = latents()
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Cauchy(x @ w, sd), obs=y)

    result = outputs(model, draws, x)
    assert (result.kind, result.probs_SNK, result.mean_SN, result.variance_SN) == ("other", None, None, None)
    with pytest.raises(ModelError, match=r"'obs'.*Cauchy.*no mean and variance"):
        function_values(model, draws, x)
    y = torch.randn(N)
    expected = dist.Cauchy(draws["w"] @ x.T, draws["sd"].unsqueeze(-1)).log_prob(y)
    assert_close(log_likelihood(model, draws, x, y), expected)


def test_two_plates_are_flattened_in_order(draws):
    def model(y=None):
        w, sd = latents()
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", D, dim=-1):
            pyro.sample("obs", dist.Normal(w + torch.tensor([[0.0], [10.0]]), sd), obs=y)

    assert_close(outputs(model, draws).mean_SN, torch.cat([draws["w"], draws["w"] + 10], -1))
    assert log_likelihood(model, draws, torch.zeros(2, D)).shape == (S, 2 * D)


def test_distributions_narrower_than_their_plate(draws):
    def model(y=None):
        _, sd = latents()
        with pyro.plate("data", N):
            pyro.sample("obs", dist.Normal(0.0, sd), obs=y)

    assert_close(outputs(model, draws).variance_SN, (draws["sd"] ** 2).unsqueeze(-1).expand(S, N))


# Plates that show some rows


def indexed(x, y=None):
    w, sd = latents()
    with pyro.plate("data", N, subsample_size=3) as rows:
        pyro.sample("obs", dist.Normal(x[rows] @ w, sd), obs=None if y is None else y[rows])


def by_subsample(x, y=None):
    w, sd = latents()
    with pyro.plate("data", N, subsample_size=3):
        mean = pyro.subsample(x, event_dim=1) @ w
        pyro.sample("obs", dist.Normal(mean, sd), obs=None if y is None else pyro.subsample(y, event_dim=0))


def network_first(x, y=None):
    w, sd = latents()
    mean = x @ w
    with pyro.plate("data", N, subsample_size=3) as rows:
        pyro.sample("obs", dist.Normal(mean[rows], sd), obs=None if y is None else y[rows])


def one_row(x, y=None):
    w, sd = latents()
    with pyro.plate("data", N, subsample_size=1) as rows:
        pyro.sample("obs", dist.Normal(x[rows] @ w, sd), obs=None if y is None else y[rows])


def all_rows(x, y=None):
    w, sd = latents()
    with pyro.plate("data", N, subsample_size=N) as rows:
        pyro.sample("obs", dist.Normal(x[rows] @ w, sd), obs=None if y is None else y[rows])


def branching(x, y=None):
    """Which vmap cannot do."""
    w, sd = latents()
    if sd < 0:
        raise AssertionError
    with pyro.plate("data", N, subsample_size=3) as rows:
        pyro.sample("obs", dist.Normal(x[rows] @ w, sd), obs=None if y is None else y[rows])


def by_list(x, y=None):
    """Which vmap cannot do, not even over rows."""
    w, sd = latents()
    with pyro.plate("data", N, subsample_size=3) as rows:
        rows = rows.tolist()
        pyro.sample("obs", dist.Normal(x[rows] @ w, sd), obs=None if y is None else y[rows])


@pytest.mark.parametrize("model", [indexed, by_subsample, network_first, one_row, all_rows, branching, by_list])
def test_every_row_of_a_subsampling_plate(model, x, draws, evaluation):
    evaluation.one_by_one = model in (branching, by_list)
    y = torch.randn(N)
    mean, sd = draws["w"] @ x.T, draws["sd"].unsqueeze(-1)
    assert_close(outputs(model, draws, x, y).mean_SN, mean)
    assert_close(outputs(model, draws, x).mean_SN, mean)
    assert_close(function_values(model, draws, x)[..., 1], sd.log().expand(S, N))
    # Not scaled by the plate.
    assert_close(log_likelihood(model, draws, x, y), dist.Normal(mean, sd).log_prob(y))


def test_two_subsampling_plates(draws):
    table = torch.randn(5, N)

    def model(y=None):
        w, sd = latents()
        rows = pyro.plate("rows", 5, subsample_size=2, dim=-2)
        columns = pyro.plate("columns", N, subsample_size=3, dim=-1)
        with rows as i, columns as j:
            pyro.sample("obs", dist.Normal(table[i][:, j] * w[0], sd), obs=None if y is None else y[i][:, j])

    assert_close(outputs(model, draws).mean_SN, table.flatten() * draws["w"][:, :1])
    y = torch.randn(5, N)
    expected = dist.Normal(table.flatten() * draws["w"][:, :1], draws["sd"].unsqueeze(-1)).log_prob(y.flatten())
    assert_close(log_likelihood(model, draws, y), expected)


@pytest.mark.parametrize("loop", [False, True])
def test_rows_chosen_by_the_caller_are_all_there_are(x, draws, loop, evaluation):
    evaluation.one_by_one = loop

    def model(x, y=None):
        w, sd = latents()
        assert not loop or sd > 0
        mean = x @ w
        with pyro.plate("data", 1000, subsample_size=len(x)) as rows:
            assert not loop or rows.tolist()
            pyro.sample("obs", dist.Normal(mean, sd), obs=y)

    y = torch.randn(N)
    mean, sd = draws["w"] @ x.T, draws["sd"].unsqueeze(-1)
    assert_close(outputs(model, draws, x).mean_SN, mean)
    assert_close(log_likelihood(model, draws, x, y), dist.Normal(mean, sd).log_prob(y))


def test_rows_drawn_outside_the_plate_of_the_site(x, draws):
    def model(x, y=None):
        w, sd = latents()
        with pyro.plate("data", N, subsample_size=3) as rows:
            pass
        mean = x[rows] @ w
        with pyro.plate("batch", 3):
            pyro.sample("obs", dist.Normal(mean, sd), obs=y)

    with pytest.raises(ModelError, match=r"'obs' depends on the rows that plate 'data' draws.*inside"):
        outputs(model, draws, x)


@pytest.mark.parametrize("how", ["subsample", "list", "condition"])
def test_indices_given_by_the_caller_are_kept(x, draws, how):
    def model(x, rows):
        w, sd = latents()
        given = {"subsample_size": 3} if how == "condition" else {"subsample": rows}
        with pyro.plate("data", N, **given) as rows:
            pyro.sample("obs", dist.Normal(x[rows] @ w, sd))

    rows = [4, 0, 5] if how == "list" else torch.tensor([4, 0, 5])
    if how == "condition":
        model = poutine.condition(model, data={"data": rows})
    assert_close(outputs(model, draws, x, rows).mean_SN, draws["w"] @ x[[4, 0, 5]].T)


def test_chunks_count_all_rows(x, draws, monkeypatch):
    """A row at a time in the model, but all rows in memory."""
    sizes = []
    monkeypatch.setattr(Footprint, "chunk_size", lambda self, num_draws, times=1: sizes.append(times) or num_draws)
    outputs(one_row, draws, x)
    assert sizes == [N]


# Draws: chunks, gradients, one by one


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_chunks_change_nothing(x, draws, chunk_size):
    y = torch.randn(N)
    whole, parts = outputs(indexed, draws, x), outputs(indexed, draws, x, chunk_size=chunk_size)
    assert_close(parts.mean_SN, whole.mean_SN)
    for function, args in [(function_values, (x,)), (log_likelihood, (x, y))]:
        assert_close(function(indexed, draws, *args, chunk_size=chunk_size), function(indexed, draws, *args))


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_gradients_reach_the_draws(x, chunk_size):
    draws = {"w": torch.randn(S, D).double().requires_grad_(), "sd": torch.rand(S).double().add(0.5).requires_grad_()}
    x = x.double()

    def features(w, sd):
        return function_values(indexed, {"w": w, "sd": sd}, x, chunk_size=chunk_size)

    assert torch.autograd.gradcheck(features, tuple(draws.values()))
    assert torch.autograd.gradgradcheck(features, tuple(draws.values()))  # a gradient penalty needs these
    y = torch.randn(N).double()
    assert not log_likelihood(indexed, draws, x, y).requires_grad
    assert not outputs(indexed, draws, x).mean_SN.requires_grad


def test_gradients_one_by_one(x, draws, evaluation):
    evaluation.one_by_one = True
    by_model = {}
    for model in (indexed, branching):
        w = draws["w"].clone().requires_grad_()
        value = function_values(model, {**draws, "w": w}, x).square().sum()
        by_model[model] = torch.autograd.grad(value, w)[0]
    assert_close(by_model[branching], by_model[indexed])


def test_a_view_serves_other_draws_and_data(x, draws):
    view = FunctionView(Network(), {"net.0.weight": torch.randn(1, 5, D), "net.0.bias": torch.randn(1, 5)}, x)
    draws = {"net.0.weight": torch.randn(9, 5, D), "net.0.bias": torch.randn(9, 5)}
    assert_close(view(draws), function_values(Network(), draws, x))
    other = torch.randn(2 * N, D)
    assert_close(view(draws, other), function_values(Network(), draws, other))
    assert view(draws, other, chunk_size=2).shape == (9, 2 * N, 5)


def test_a_view_of_a_subsampling_plate_serves_other_data(x, draws):
    def model(x):
        w, sd = latents()
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            pyro.sample("obs", dist.Normal(x[rows] @ w, sd))

    view = FunctionView(model, draws, x)
    for other in (torch.randn(2 * N, D), torch.randn(4, D), x):
        assert_close(view(draws, other)[..., 0], draws["w"] @ other.T)
    assert_close(view(draws)[..., 0], draws["w"] @ x.T)


# Which site


def several(x, y=None, z=None):
    w, sd = latents()
    with pyro.plate("data", len(x)):
        pyro.deterministic("mean", x @ w, event_dim=0)
        pyro.sample("y", dist.Normal(x @ w, sd), obs=y)
        pyro.sample("z", dist.Laplace(x @ w, sd), obs=z)
    pyro.factor("penalty", -(w**2).sum())


def test_several_observed_sites_need_a_name(x, draws):
    for function in (outputs, function_values, log_likelihood):
        with pytest.raises(ModelError, match=r"several.*\['y', 'z'\].*`site=`"):
            function(several, draws, x)
    for site in ("y", "z"):
        assert outputs(several, draws, x, site=site).site == site
    assert_close(outputs(several, draws, x, site="z").variance_SN[:, 0], 2 * draws["sd"] ** 2)
    y = torch.randn(N)
    assert_close(
        log_likelihood(several, draws, x, z=y, site="z"),
        dist.Laplace(draws["w"] @ x.T, draws["sd"].unsqueeze(-1)).log_prob(y),
    )
    for site in ("penalty", "mean", "w", "none", "data"):
        with pytest.raises(ValueError, match=rf"'{site}' is not an observed site.*\['y', 'z'\]"):
            outputs(several, draws, x, site=site)


def test_nothing_observed(draws):
    def model():
        w, _ = latents()
        pyro.factor("likelihood", -w.square().sum())
        pyro.deterministic("twice", 2 * w)

    with pytest.raises(ModelError, match=r"no sample site besides those in the draws.*pyro.factor"):
        outputs(model, draws)


def test_a_latent_missing_from_the_draws(x, draws):
    with pytest.raises(ModelError, match=r"\['sd', 'obs'\].*add to the draws"):
        outputs(indexed, {"w": draws["w"]}, x)


def test_a_model_conditioned_by_the_user(x, draws):
    y = torch.randn(N)

    def model(x):
        w, sd = latents()
        with pyro.plate("data", N):
            pyro.sample("obs", dist.Normal(x @ w, sd))

    conditioned = poutine.condition(model, data={"obs": y})
    expected = dist.Normal(draws["w"] @ x.T, draws["sd"].unsqueeze(-1)).log_prob(y)
    assert_close(log_likelihood(conditioned, draws, x), expected)


# Errors and state


def test_log_likelihood_needs_observations(x, draws):
    with pytest.raises(ValueError, match=r"no observations for site 'obs'.*model, draws, x, y"):
        log_likelihood(indexed, draws, x)


def test_observations_of_the_wrong_shape(x, draws):
    def model(x, y):
        w, sd = latents()
        pyro.sample("obs", dist.Normal(x @ w, sd), obs=y)

    with pytest.raises(ModelError, match=r"'obs' has observations of shape \(7, 1\).*for \(7,\)"):
        log_likelihood(model, draws, x, torch.randn(N, 1))


def test_impossible_observations(x):
    def coin(x, y=None):
        logits = pyro.sample("w", dist.Normal(torch.zeros(D), 1.0).to_event(1)) * x
        with pyro.plate("data", N):
            pyro.sample("obs", dist.Bernoulli(logits=logits).to_event(1), obs=y)

    y = torch.ones(N, D)
    y[2, 1], y[3, 0] = 2.0, torch.nan
    with pytest.raises(ValueError, match=r"2 observations of site 'obs' cannot come from.*Bernoulli"):
        log_likelihood(coin, {"w": torch.randn(S, D)}, x, y)
    with pyro.validation_enabled(False):
        assert log_likelihood(coin, {"w": torch.randn(S, D)}, x, y).shape == (S, N)


@pytest.mark.parametrize("function", [outputs, function_values, log_likelihood])
@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({}, "at least one site"),
        ({"w": torch.ones(2, D), "sd": torch.ones(3)}, "different numbers.*'w': 2, 'sd': 3"),
        ({"w": torch.ones(0, D), "sd": torch.ones(0)}, "zero draws"),
        ({"w": 1.0}, r"\['w'\].*got float"),
    ],
)
def test_bad_draws(x, function, bad, match):
    with pytest.raises(ValueError, match=match):
        function(indexed, bad, x, torch.ones(N))


def test_bad_chunk_size(x, draws):
    with pytest.raises(ValueError, match="chunk_size=0 must be a positive integer"):
        outputs(indexed, draws, x, chunk_size=0)


@pytest.mark.parametrize("fails", [False, True])
def test_global_state_and_outer_handlers_are_left_alone(x, draws, fails):
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.offset = nn.Parameter(torch.zeros(()))
            self.scale = PyroParam(torch.ones(()), dist.constraints.positive)

        def forward(self, x, y=None):
            w, sd = latents()
            if fails:
                raise RuntimeError("the model's own")
            with pyro.plate("data", N):
                pyro.sample("obs", dist.Normal(x @ w + self.offset, sd * self.scale), obs=y)

    y = torch.randn(N)
    with poutine.trace() as outer:
        for function, args in [(outputs, (x,)), (function_values, (x,)), (log_likelihood, (x, y))]:
            if fails:
                with pytest.raises(RuntimeError, match="the model's own"):
                    function(Model(), draws, *args)
            else:
                function(Model(), draws, *args)
    assert not outer.trace.nodes
    assert dist.is_validation_enabled()
    assert torch.is_grad_enabled()
    assert not list(pyro.get_param_store().keys())
    assert not poutine.runtime.am_i_wrapped()


def test_parameters_of_the_model_are_live(x, draws):
    def model(x):
        w, sd = latents()
        offset = pyro.param("offset", lambda: torch.randn(()))
        with pyro.plate("data", N):
            pyro.sample("obs", dist.Normal(x @ w + offset, sd))

    mean = draws["w"] @ x.T
    view = FunctionView(model, draws, x)
    assert_close(view(draws), view(draws))  # one offset, though the store keeps none
    assert (view(draws)[..., 0] - mean).std() < 1e-5
    pyro.param("offset", torch.tensor(3.0))
    assert_close(view(draws)[..., 0], mean + 3)
    assert_close(outputs(model, draws, x).mean_SN, mean + 3)
    pyro.clear_param_store()


def test_a_site_that_comes_and_goes(evaluation):
    def model():
        w, _ = latents()
        pyro.sample("obs" if w[0] > 0 else "no", dist.Normal(w.sum(), 1.0))

    evaluation.one_by_one = True
    with pytest.raises(ModelError, match="did not come to site 'obs'"):
        outputs(model, {"w": torch.tensor([[1.0] * D, [-1.0] * D]), "sd": torch.ones(2)})


def test_probabilities_of_logits_in_the_thousands_sum_to_one():
    """Normalised once, log-probabilities of such logits are off by their last digit, some 1e-4."""
    model = BNN(nn.Linear(2, 3), likelihood="categorical", prior_scale=1.0)
    draws = {"net.weight": torch.zeros(50, 3, 2), "net.bias": 5000 + torch.randn(50, 3)}
    probs_SNK = function_values(model, draws, torch.randn(4, 2)).exp()
    assert_close(probs_SNK.sum(-1), torch.ones(50, 4))
    assert_close(probs_SNK[:, 0].double(), draws["net.bias"].double().softmax(-1), atol=1e-6, rtol=1e-5)
    assert uncertainty.mutual_information(probs_SNK).isfinite().all()
