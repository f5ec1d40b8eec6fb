# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Pyro models as users write them, as source code: each is drawn from one integer.

A model is a network, a likelihood, plates, and a style of batches. About half of them have a planted fault: the
likelihood of a batch is no sum over rows (kind 1), something other than the data depends on the number of rows (kind
2), or the model draws random numbers or changes from call to call (kind 4).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

STYLES = ("tensors", "numpy", "loader", "list", "plate", "full")
#: Styles in which the model is given the rows of a batch.
READY_ROWS = ("tensors", "numpy", "loader", "list")


@dataclass(frozen=True)
class Network:
    """Code of a network from rows ``x`` ``(n, D)`` to outputs ``f``, ``(n,)`` or ``(n, K)``.

    :ivar setup: lines at the top level. ``weights``: lines that draw latents. ``forward``: lines that compute ``f``.
    :ivar columns: arguments that it reads besides ``x``.
    """

    forward: tuple[str, ...]
    weights: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Likelihood:
    """Code of a likelihood of targets ``y``, given outputs ``f``.

    :ivar int num_outputs: K; 0 for outputs ``(n,)``.
    :ivar targets: expression of all targets. ``fn``: of the distribution; its batch shape is ``(n,)``.
    :ivar weights: lines that draw its latents.
    :ivar by_entry: whether the distribution is over the entries of ``f``, so that more of them can be observed.
    :ivar is_real: whether any real number is a target.
    :ivar is_cast: whether plain Pyro needs the targets in another dtype, so that a refusal is right, too.
    """

    name: str
    num_outputs: int
    targets: str
    fn: str
    weights: tuple[str, ...] = ()
    by_entry: bool = False
    is_real: bool = False
    is_cast: bool = False


@dataclass(frozen=True)
class Fault:
    """A planted fault: code, and where it goes.

    :ivar at: ``start``, ``x``, ``h``, ``f``: lines there; ``sites``: lines beside the observed site; ``data``: lines
        after the data; ``sd``, ``noise``: an expression in place of that of a prior or of the noise; ``inside``,
        ``around``: contexts of the observed site or of the whole model; ``observed``: lines in place of that site.
    :ivar is_reference: styles in which the model with its fault, run by plain Pyro on all data, has the density that is
        meant. In others it is that of the model without the fault.
    :ivar needs: whether a model can have it.
    :ivar tolerated: styles in which both a refusal and a run are right where it makes no difference.
    :ivar clean_start: lines that undo ``data`` in the reference.
    """

    name: str
    kind: int
    at: str
    code: tuple[str, ...]
    setup: tuple[str, ...] = ()
    is_reference: tuple[str, ...] = STYLES
    needs: Callable[[Model], bool] = lambda model: True
    tolerated: tuple[str, ...] = ()
    clean_start: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """What was drawn for one model.

    :ivar plate: the kind of plate. ``in_plate``: what is computed inside a plate that subsamples, and ``takes``: how it
        takes rows.
    :ivar columns: arguments besides ``x`` and ``y``. ``option``: whether there is one more that has no rows.
    :ivar setup: lines after the data. ``x_lines``: lines before the network; ``last``: before the observed site;
        ``beside``: beside it, in its plate; ``sites``: after it. ``inside``: contexts of the observed site.
    :ivar observed: how the data are scored. ``states``: settings of the kernel.
    """

    seed: int
    dtype: str
    num_data: int
    batch_size: int
    style: str
    network: str
    likelihood: Likelihood
    parts: Network
    plate: str
    signature: str
    num_inputs: int
    groups: int
    inside: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    x_lines: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    observed: str = "sample"
    in_plate: str = "out"
    last: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    option: bool = False
    takes: str = "rows"
    states: tuple[str, ...] = ()
    fault: Fault | None = None

    @property
    def may_be_refused(self) -> bool:
        """Whether a refusal is right although there is no fault: what is written differs from what plain Pyro runs."""
        sequential = self.plate == "sequential" and self.style != "full"
        by_one_row = self.batch_size == 1 and self.style in ("numpy", "loader", "list")
        return self.likelihood.is_cast or self.observed == "obs_mask" or sequential or by_one_row


# ---- Networks. {SD} is the scale of a prior, {H} the hidden units, {D} inputs, {K} outputs, {G} groups; HOOK a fault.


def _shapes(num_outputs: int) -> tuple[str, str]:
    """Trailing shape of a weight with K outputs, and its number of dimensions."""
    return (f", {num_outputs}", "2") if num_outputs else ("", "1")


def linear(rng: random.Random, k: int, sizes: dict[str, int]) -> Network:
    tail, dims = _shapes(k)
    weights = [f'w = pyro.sample("w", dist.Normal(torch.zeros({sizes["D"]}{tail}), SD).to_event({dims}))']
    if rng.random() < 0.5:
        bias = f"torch.zeros({max(k, 1)}), 1.0).to_event(1" if k or rng.random() < 0.3 else "0.0, 1.0"
        weights.append(f'b = pyro.sample("b", dist.Normal({bias}))')
        return Network(("f = x @ w + b",), tuple(weights))
    return Network(("f = x @ w",), tuple(weights))


def linear_in_plate(rng: random.Random, k: int, sizes: dict[str, int]) -> Network:
    if k:
        plates = f'with pyro.plate("units", {k}, dim=-1), pyro.plate("features", {sizes["D"]}, dim=-2):'
    else:
        plates = f'with pyro.plate("features", {sizes["D"]}):'
    return Network(("f = x @ w",), (plates, '    w = pyro.sample("w", dist.Normal(0.0, SD))'))


def hierarchical(rng: random.Random, k: int, sizes: dict[str, int]) -> Network:
    tail, dims = _shapes(k)
    prior = rng.choice(
        ("HalfCauchy(1.0)", "HalfNormal(1.0)", "Gamma(2.0, 2.0)", "LogNormal(0.0, 0.5)", "InverseGamma(3.0, 2.0)",
         "Exponential(1.0)", "Uniform(0.1, 3.0)")
    )  # fmt: skip
    shape = f"{sizes['D']}{tail}"
    lines = [f'tau = pyro.sample("tau", dist.{prior})']
    if rng.random() < 0.4:
        lines.append(f'lam = pyro.sample("lam", dist.HalfCauchy(torch.ones({shape})).to_event({dims}))')
        scale = "SD * tau * lam"
    else:
        scale = "SD * tau"
    lines.append(f'w = pyro.sample("w", dist.Normal(torch.zeros({shape}), {scale}).to_event({dims}))')
    return Network(("f = x @ w",), tuple(lines))


def mlp(rng: random.Random, k: int, sizes: dict[str, int]) -> Network:
    tail, dims = _shapes(k)
    d, h = sizes["D"], sizes["H"]
    act = rng.choice(("torch.tanh", "torch.relu", "F.silu", "torch.sigmoid"))
    weights = [f'w1 = pyro.sample("w1", dist.Normal(torch.zeros({d}, {h}), SD).to_event(2))']
    forward = [f"h = {act}(x @ w1 + b1)", "HOOK"]
    if rng.random() < 0.5:
        weights += [f'with pyro.plate("hidden", {h}):', '    b1 = pyro.sample("b1", dist.Normal(0.0, 1.0))']
        if not k:
            weights += ['    w2 = pyro.sample("w2", dist.Normal(0.0, 0.3))']
    else:
        weights += [f'b1 = pyro.sample("b1", dist.Normal(torch.zeros({h}), 1.0).to_event(1))']
    if k or "w2" not in weights[-1]:
        weights += [f'w2 = pyro.sample("w2", dist.Normal(torch.zeros({h}{tail}), 0.3).to_event({dims}))']
    if rng.random() < 0.4:
        weights += [f'wm = pyro.sample("wm", dist.Normal(torch.zeros({h}, {h}), 0.3).to_event(2))']
        forward += [f"h = {act}(h @ wm)"]
    return Network((*forward, "f = h @ w2"), tuple(weights))


def module(rng: random.Random, k: int, sizes: dict[str, int]) -> Network:
    d, h, out = sizes["D"], sizes["H"], max(k, 1)
    act = rng.choice(("torch.tanh", "torch.relu", "F.gelu"))
    # `squeeze()` fails on a batch of one row, which an epoch has where it ends with one.
    squeeze = (
        "" if k else rng.choice((".squeeze(-1)", "[:, 0]", ".squeeze(-1)" if sizes["last"] == 1 else ".squeeze()"))
    )
    setup = [
        "class Net(PyroModule):",
        "    def __init__(self):",
        "        super().__init__()",
        f"        self.a, self.b = PyroModule[nn.Linear]({d}, {h}), PyroModule[nn.Linear]({h}, {out})",
        "        for layer in (self.a, self.b):",
        "            for name, p in list(layer.named_parameters()):",
        "                prior = dist.Normal(0.0, 0.5).expand(p.shape).to_event(p.dim())",
        "                setattr(layer, name, PyroSample(prior))",
        "    def forward(self, x):",
        f"        h = {act}(self.a(x))",
        "        HOOK",
        f"        return self.b(h){squeeze}",
        "net = Net()",
    ]
    return Network(("f = net(x)",), (), tuple(setup))


def convolution(rng: random.Random, k: int, sizes: dict[str, int]) -> Network:
    tail, dims = _shapes(k)
    d = sizes["D"]
    weights = [
        'c = pyro.sample("c", dist.Normal(torch.zeros(2, 1, 2), SD).to_event(3))',
        f'w = pyro.sample("w", dist.Normal(torch.zeros({2 * (d - 1)}{tail}), 0.5).to_event({dims}))',
    ]
    return Network(("h = torch.relu(F.conv1d(x[:, None], c)).flatten(1)", "HOOK", "f = h @ w"), tuple(weights))


def convolution_module(rng: random.Random, k: int, sizes: dict[str, int]) -> Network:
    tail, dims = _shapes(k)
    setup = [
        "conv = PyroModule[nn.Conv1d](1, 2, 2)",
        "conv.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2, 1, 2]).to_event(3))",
        "conv.bias = PyroSample(dist.Normal(0.0, 1.0).expand([2]).to_event(1))",
    ]
    shape = f"{2 * (sizes['D'] - 1)}{tail}"
    weights = [f'w = pyro.sample("w", dist.Normal(torch.zeros({shape}), SD).to_event({dims}))']
    return Network(("h = torch.tanh(conv(x[:, None])).flatten(1)", "HOOK", "f = h @ w"), tuple(weights), tuple(setup))


def embedding(rng: random.Random, k: int, sizes: dict[str, int]) -> Network:
    tail, dims = _shapes(k)
    base = linear(rng, k, sizes)
    weights = f'e = pyro.sample("e", dist.Normal(torch.zeros({sizes["G"]}{tail}), 1.0).to_event({dims}))'
    return Network((*base.forward, "f = f + e[g]"), (*base.weights, weights), columns=("g",))


def embedding_module(rng: random.Random, k: int, sizes: dict[str, int]) -> Network:
    base = linear(rng, k, sizes)
    setup = [
        f"table = PyroModule[nn.Embedding]({sizes['G']}, {max(k, 1)})",
        "table.weight = PyroSample(dist.Normal(0.0, 1.0).expand(table.weight.shape).to_event(2))",
    ]
    return Network((*base.forward, f"f = f + table(g){'' if k else '[:, 0]'}"), base.weights, tuple(setup), ("g",))


def intercepts(rng: random.Random, k: int, sizes: dict[str, int]) -> Network:
    base = linear(rng, k, sizes)
    weights = [
        'mu, tau = pyro.sample("mu", dist.Normal(0.0, 1.0)), pyro.sample("tau", dist.HalfNormal(1.0))',
        f'with pyro.plate("groups", {sizes["G"]}):',
        '    a = pyro.sample("a", dist.Normal(mu, tau))',
    ]
    return Network((*base.forward, f"f = f + a[g]{'[:, None]' if k else ''}"), (*base.weights, *weights), (), ("g",))


def mean(rng: random.Random, k: int, sizes: dict[str, int]) -> Network:
    """No network: one mean of all data."""
    if k:
        return Network(("f = mu",), (f'mu = pyro.sample("mu", dist.Normal(torch.zeros({k}), SD).to_event(1))',))
    return Network(("f = mu",), ('mu = pyro.sample("mu", dist.Normal(0.0, SD))',))


def bnn(rng: random.Random, k: int, sizes: dict[str, int]) -> Network:
    """``apd.BNN``; the likelihood and the plate are its own."""
    d, h, out = sizes["D"], sizes["H"], max(k, 1)
    act = rng.choice(("Tanh", "ReLU", "SiLU"))
    more = rng.choice(("", "", "nn.Dropout(0.5), ", f"nn.BatchNorm1d({h}), ", f"nn.LayerNorm({h}), "))
    likelihood = rng.choice(("gaussian", "bernoulli") if k < 3 else ("categorical",))
    options = ", noise_scale=0.7" if likelihood == "gaussian" and rng.random() < 0.5 else ""
    setup = [
        "class Hidden(nn.Module):",
        "    def forward(self, h):",
        "        HOOK",
        "        return h",
        f"layers = nn.Linear({d}, {h}), nn.{act}(), {more}Hidden(), nn.Linear({h}, {out})",
        f'bnn = apd.BNN(nn.Sequential(*layers), likelihood="{likelihood}"{options}, subsample_size=SUBSAMPLE)',
    ]
    return Network(("f = bnn(x, y)",), (), tuple(setup))


NETWORKS: dict[str, Callable[[random.Random, int, dict[str, int]], Network]] = {
    "linear": linear, "linear in a plate": linear_in_plate, "hierarchical": hierarchical, "MLP": mlp,
    "PyroModule": module, "convolution": convolution, "PyroModule convolution": convolution_module,
    "embedding": embedding, "PyroModule embedding": embedding_module, "intercepts": intercepts, "mean": mean,
    "BNN": bnn,
}  # fmt: skip

# ---- Likelihoods

_POSITIVE = "F.softplus(f) + 0.1"
_REAL, _COUNT = "real(N)", "count(N)"


def _likelihoods() -> list[Likelihood]:
    noise = ('s = pyro.sample("s", dist.HalfNormal(1.0))',)
    log_noise = ('s = pyro.sample("log_s", dist.Normal(0.0, 0.5)).exp()',)
    classes, entries = "label(N)", {"by_entry": True}
    return [
        Likelihood("Normal", 0, _REAL, "dist.Normal(f, NOISE)", (), True, True),
        Likelihood("Normal", 0, _REAL, "dist.Normal(f, NOISE * s)", noise, True, True),
        Likelihood("Normal", 0, _REAL, "dist.Normal(f, NOISE * s)", log_noise, True, True),
        Likelihood(
            "Normal, noise by row", 2, _REAL, "dist.Normal(f[..., 0], F.softplus(f[..., 1]) + 0.1)", is_real=True,
        ),
        Likelihood("StudentT", 0, _REAL, "dist.StudentT(5.0, f, NOISE)", (), True, True),
        Likelihood("Laplace", 0, _REAL, "dist.Laplace(f, NOISE)", (), True, True),
        Likelihood("Cauchy", 0, _REAL, "dist.Cauchy(f, NOISE * s)", noise, True, True),
        Likelihood("Bernoulli", 0, "binary(N)", "dist.Bernoulli(logits=f)", **entries),  # type: ignore[arg-type]
        Likelihood("Binomial", 0, "binary(N) * 3", "dist.Binomial(total_count=5, logits=f)"),
        Likelihood("Categorical", 3, classes, "dist.Categorical(logits=f)"),
        Likelihood("OneHotCategorical", 3, "torch.eye(3)[label(N)]", "dist.OneHotCategorical(logits=f)"),
        Likelihood("Multinomial", 3, "torch.eye(3)[label(N)] * 4", "dist.Multinomial(total_count=4, logits=f)"),
        Likelihood("Poisson", 0, _COUNT, f"dist.Poisson({_POSITIVE})", **entries),  # type: ignore[arg-type]
        Likelihood("Poisson", 0, _COUNT, "dist.Poisson((0.3 * f).exp())"),
        Likelihood("NegativeBinomial", 0, _COUNT, "dist.NegativeBinomial(total_count=3.0, logits=f)"),
        Likelihood("GammaPoisson", 0, _COUNT, f"dist.GammaPoisson(2.0, {_POSITIVE})"),
        Likelihood("ZeroInflatedPoisson", 0, _COUNT, f"dist.ZeroInflatedPoisson({_POSITIVE}, gate=torch.tensor(0.3))"),
        Likelihood(
            "ZeroInflatedPoisson", 0, _COUNT, f"dist.ZeroInflatedPoisson({_POSITIVE}, gate=p)",
            ('p = pyro.sample("p", dist.Beta(2.0, 2.0))',),
        ),
        Likelihood(
            "ZeroInflatedNegativeBinomial", 0, _COUNT,
            "dist.ZeroInflatedNegativeBinomial(torch.tensor(3.0), logits=f, gate_logits=torch.tensor(-1.0))",
        ),
        Likelihood("LogNormal", 0, "real(N).exp()", "dist.LogNormal(f, NOISE)"),
        Likelihood("Gamma", 0, "real(N).exp()", f"dist.Gamma(2.0, {_POSITIVE})"),
        Likelihood("Exponential", 0, "real(N).exp()", f"dist.Exponential({_POSITIVE})"),
        Likelihood("Weibull", 0, "real(N).exp()", f"dist.Weibull({_POSITIVE}, 1.5)"),
        Likelihood("Beta", 0, "fraction(N)", f"dist.Beta({_POSITIVE}, 2.0)"),
        Likelihood("Beta", 2, "fraction(N)", "dist.Beta(*(F.softplus(f) + 0.1).unbind(-1))"),
        Likelihood("Dirichlet", 3, "torch.eye(3)[label(N)] * 0.4 + 0.2", f"dist.Dirichlet({_POSITIVE})"),
        Likelihood("VonMises", 0, "real(N).sin()", "dist.VonMises(f, 2.0)"),
        Likelihood(
            "OrderedLogistic", 0, classes, "dist.OrderedLogistic(f, cut)",
            ('cut = pyro.sample("lo", dist.Normal(-1.0, 0.3)) + torch.tensor([0.0, 2.0])',),
        ),
        Likelihood("several outputs", 2, "real(N, 2)", "dist.Normal(f, NOISE).to_event(1)", is_real=True),
        Likelihood("several outputs", 2, "binary(N, 2)", "dist.Bernoulli(logits=f).to_event(1)"),
        Likelihood(
            "MultivariateNormal", 2, "real(N, 2)",
            "dist.MultivariateNormal(f, scale_tril=torch.tensor([[1.0, 0.0], [0.3, 0.8]]))", is_real=True,
        ),
        Likelihood(
            "MixtureSameFamily", 4, _REAL,
            "dist.MixtureSameFamily(dist.Categorical(logits=f[..., :2]), dist.Normal(f[..., 2:], 1.0))", is_real=True,
        ),
        Likelihood(
            "transformed", 0, "real(N).exp()",
            "dist.TransformedDistribution(dist.Normal(f, 1.0), dist.transforms.ExpTransform())",
        ),
        Likelihood("a column", 1, "real(N, 1)", "dist.Normal(f, NOISE).to_event(1)", is_real=True),
        Likelihood(
            "mixture with latent weights", 2, _REAL,
            "dist.MixtureSameFamily(dist.Categorical(probs=mix.expand(f.shape)), dist.Normal(f, NOISE))",
            ('mix = pyro.sample("mix", dist.Dirichlet(torch.ones(2)))',), is_real=True,
        ),
        Likelihood(
            "latent covariance", 2, "real(N, 2)", "dist.MultivariateNormal(f, scale_tril=s[:, None] * corr)",
            (
                's = pyro.sample("s", dist.LogNormal(torch.zeros(2), 0.3).to_event(1))',
                'corr = pyro.sample("corr", dist.LKJCholesky(2, 2.0))',
            ),
            is_real=True,
        ),
        Likelihood(
            "noise of each output", 2, "real(N, 2)", "dist.Normal(f, NOISE * s).to_event(1)",
            ('with pyro.plate("noises", 2):', '    s = pyro.sample("s", dist.Gamma(2.0, 2.0))'), is_real=True,
        ),
        Likelihood("Bernoulli, labels of whole numbers", 0, "label(N) % 2", "dist.Bernoulli(logits=f)", is_cast=True),
        Likelihood("Bernoulli, labels true and false", 0, "binary(N) > 0", "dist.Bernoulli(logits=f)", is_cast=True),
    ]  # fmt: skip


LIKELIHOODS = _likelihoods()
# Those of `apd.BNN` are written by the network.
BNN_LIKELIHOODS = (
    Likelihood("of BNN", 0, "binary(N)", ""), Likelihood("of BNN", 2, "binary(N, 2)", ""),
    Likelihood("of BNN", 3, "label(N)", ""),
)  # fmt: skip

# ---- Faults


def _ready(model: Model) -> bool:
    return model.style in READY_ROWS


def _is_raw(model: Model) -> bool:
    return any("SD" in line for line in model.parts.weights)


def _has_hidden(model: Model) -> bool:
    return any("HOOK" in line for line in (*model.parts.forward, *model.parts.setup))


def _is_vector(model: Model) -> bool:
    """One output per datum, of entries that can be broadcast."""
    return model.likelihood.num_outputs == 0 and model.likelihood.by_entry and not model.inside


def _plain(model: Model) -> bool:
    return _is_vector(model) and model.plate in ("len", "shape", "bare", "states N") and model.observed == "sample"


def _row_target(model: Model) -> bool:
    return model.likelihood.is_real and model.likelihood.targets == _REAL and model.likelihood.num_outputs == 0


def _replaceable(model: Model) -> bool:
    return model.style != "plate" and not model.inside and model.plate in ("len", "shape", "bare")


def _by_row(model: Model) -> bool:
    return model.plate in ("len", "shape", "bare", "states N", "states rows")


def _several(model: Model) -> bool:
    return model.likelihood.num_outputs > 1


def _faults() -> list[Fault]:
    def one(name: str, at: str, *code: str, **rest: object) -> Fault:
        return Fault(name, 1, at, code, **rest)  # type: ignore[arg-type]

    def two(name: str, at: str, *code: str, **rest: object) -> Fault:
        return Fault(name, 2, at, code, **rest)  # type: ignore[arg-type]

    def four(name: str, at: str, *code: str, **rest: object) -> Fault:
        return Fault(name, 4, at, code, **{"is_reference": (), **rest})  # type: ignore[arg-type]

    return [
        # Kind 1: the likelihood of a batch is no sum over rows.
        one("inputs centred by the batch", "x", "x = x - x.mean(0)"),
        one("inputs standardised by the batch", "x", "x = (x - x.mean(0)) / (x.std(0, unbiased=False) + 0.1)"),
        one("a little of the batch's mean", "x", "x = x + 0.01 * x.mean(0)"),
        one("inputs over the batch's largest", "x", "x = x / (x.abs().amax(0) + 0.1)"),
        one("attention over rows", "x", "x = (x @ x.T).softmax(-1) @ x"),
        one("inputs of the row before", "x", "x = torch.roll(x, 1, 0)"),
        one("sum of the rows before", "x", "x = x.cumsum(0)"),
        one("a row's place in the batch", "x", "x = x * torch.linspace(-1.0, 1.0, len(x))[:, None]"),
        one("weights of the first rows", "x", "x = x * v_all[: len(x), None]",
            setup=("v_all = torch.linspace(0.5, 2.0, N)",)),
        one("only some rows centred", "x", "x = torch.where(x[:, :1] > 0.8, x - x.mean(0), x)"),
        one("differences to the last row", "x", "x = x - 0.3 * x[-1:]"),
        one("rows and columns mixed by reshape", "x", "x = x.reshape(D, len(x)).T"),
        one("columns of the batch of norm one", "x", "x = F.normalize(x, dim=0)"),
        one("LayerNorm over rows, too", "x", "x = F.layer_norm(x, x.shape)"),
        one("less the batch's median", "x", "x = x - x.median(0).values"),
        one("ranks in the batch", "x", "x = x.argsort(0).argsort(0) / len(x) + 0.1 * x"),
        one("rows in order of size", "x", "x = x.sort(0).values"),
        one("convolution over rows", "x", "x = F.conv1d(x.T[:, None], torch.ones(1, 1, 3) / 3, padding=1)[:, 0].T"),
        one("GRU over rows", "x", "x = x + gru(x)[0]", setup=("gru = nn.GRU(D, D).requires_grad_(False)",)),
        one("a Transformer that takes rows as a sequence", "x", "x = layer(x[:, None])[:, 0]",
            setup=("layer = nn.TransformerEncoderLayer(D, 1, 4).requires_grad_(False).eval()",)),
        one("distances to the other rows", "x", "x = x * (1 + (x[:, None] - x[None]).abs().mean((1, 2))[:, None])"),
        one("centred where the batch leans", "x", "if x.mean() > 0:", "    x = x - x.mean(0)",
            tolerated=("plate",)),
        one("singular vectors of the batch", "x", "x = x @ torch.linalg.svd(x.T @ x)[0]"),
        one("features around the first rows", "x", "x = torch.cat([x[:, 1:], torch.cdist(x, x[:1])], -1)"),
        one("F.batch_norm", "x", "x = F.batch_norm(x, None, None, training=True)"),
        one("BatchNorm1d in training mode", "x", "x = norm(x)", setup=("norm = nn.BatchNorm1d(D)",),
            tolerated=("full", "plate")),
        one("hidden units centred by the batch", "h", "h = h - h.mean(0)", needs=_has_hidden),
        one("hidden units over the batch's norm", "h", "h = h / (h.norm() + 1.0)", needs=_has_hidden),
        one("BatchNorm1d on hidden units", "h", "h = norm(h)", setup=("norm = nn.LazyBatchNorm1d(affine=False)",),
            needs=_has_hidden, tolerated=("full", "plate")),
        one("outputs centred by the batch", "f", "f = f - f.mean(0)"),
        one("less the batch's positive outputs", "f", "f = f - F.relu(f).mean(0)"),
        one("doubled where the batch leans", "f", "if f.mean() > 0:", "    f = 2 * f",
            tolerated=("plate",)),
        one("without the last row", "f", "most = max(1, len(x) - 1)", "x, y, f = x[:most], y[:most], f[:most]",
            needs=lambda m: _ready(m) and m.plate == "len" and not m.inside and not m.beside and "m" not in m.columns),
        one("softmax over rows", "f", "f = f.softmax(0)"),
        one("outputs averaged over rows", "f", "f = f.mean(0, keepdim=True).expand_as(f)"),
        one("outputs of the row before", "f", "f = f + 0.5 * torch.cat([f[:1], f[:-1]])"),
        one("lagged targets", "f", "f = f + 0.5 * torch.cat([y[:1], y[:-1]])", needs=_row_target),
        one("mean of the batch's targets", "f", "f = f + y.mean(0)", needs=_row_target),
        one("noise of the batch's targets", "noise", "(0.5 + y.std(unbiased=False))",
            needs=lambda m: "NOISE" in m.likelihood.fn),
        one("targets from outside the model", "x", "y = y_all[: len(x)]", setup=("y_all = y",),
            needs=lambda m: _ready(m) and not m.likelihood.is_cast),
        one("weights normalised by the batch", "inside", "poutine.scale(scale=x[:, 0].abs() / x[:, 0].abs().mean())",
            needs=_by_row),
        one("weights by counts in the batch", "inside", "poutine.scale(scale=1.0 / (y[:, None] == y).sum(1))",
            needs=lambda m: _by_row(m) and m.likelihood.name == "Categorical"),
        one("a mask by the batch's mean", "inside", "poutine.mask(mask=x[:, 0] >= x[:, 0].mean())", needs=_by_row),
        one("a mask of the first row", "inside", "poutine.mask(mask=torch.arange(len(x)) > 0)", needs=_by_row),
        one("pairs of rows", "sites", 'pyro.factor("pairs", F.logsigmoid(f[:, None] - f[None]))',
            needs=lambda m: not m.likelihood.num_outputs and m.plate != "of BNN"),
        one("Cox's partial likelihood", "observed", 'pyro.factor("ll", f - torch.logcumsumexp(f, 0))',
            needs=lambda m: _replaceable(m) and not m.likelihood.num_outputs),
        one("a penalty on the batch's spread", "sites", 'pyro.factor("spread", -f.var(0, unbiased=False).sum())'),
        one("a penalty on neighbours", "sites", 'pyro.factor("smooth", -((f[1:] - f[:-1]) ** 2).sum())'),
        one("a penalty on the square of a sum", "sites", 'pyro.factor("total", -0.1 * f.sum() ** 2)'),
        one("prototypes of classes in the batch", "observed",
            "own = F.one_hot(y, 3).to(DTYPE)",
            "centres = own.T @ f / (own.sum(0)[:, None] + 1)",
            'with pyro.plate("data", len(x)):',
            '    pyro.sample("obs", dist.Categorical(logits=-torch.cdist(f, centres) ** 2), obs=y)',
            needs=lambda m: _replaceable(m) and m.likelihood.name == "Categorical"),
        one("a Gaussian process", "observed",
            "cov = (-torch.cdist(x, x) ** 2).exp() + torch.eye(len(x))",
            'pyro.sample("obs", dist.MultivariateNormal(f, cov), obs=y)',
            needs=lambda m: _replaceable(m) and _row_target(m)),
        one("contrast within the batch", "observed",
            'with pyro.plate("rows", len(x)):',
            '    pyro.sample("obs", dist.Categorical(logits=f @ f.T), obs=torch.arange(len(x)))',
            needs=lambda m: _replaceable(m) and _several(m)),
        one("a factor of a sum", "observed", 'pyro.factor("ll", FN.log_prob(y).sum())', needs=_replaceable),
        one("mean of the log-likelihoods", "observed", 'pyro.factor("ll", FN.log_prob(y).mean())', needs=_replaceable),
        one("square of a sum of errors", "observed", 'pyro.factor("ll", -((f - y).sum() ** 2))',
            needs=lambda m: _replaceable(m) and _row_target(m)),
        one("logsumexp over rows", "observed", 'pyro.factor("ll", FN.log_prob(y).logsumexp(0))', needs=_replaceable),
        one("a latent for each row", "f", 'with pyro.plate("local", len(x)):',
            '    z = pyro.sample("z", dist.Normal(0.0, 1.0))', "f = f + (z if f.dim() == 1 else z[:, None])",
            needs=lambda m: m.style != "plate"),
        one("a latent as long as the batch", "f",
            'z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))',
            "f = f + (z if f.dim() == 1 else z[:, None])", needs=lambda m: m.style != "plate"),
        one("a column of outputs", "f", "f = f[:, None]", needs=_plain, is_reference=()),
        one("a column of targets", "data", "y = y[:, None]", clean_start=("y = y.squeeze(-1)",), needs=_plain,
            is_reference=(), tolerated=("plate",)),  # right in batches of one row alone
        one("columns of outputs and targets", "f", "f, y = f[:, None], y[:, None]", is_reference=(),
            tolerated=("plate",),  # right in batches of one row alone
            needs=lambda m: _plain(m) and m.plate != "bare" and not (m.style == "plate" and m.in_plate == "out")),
        # Kind 2: something other than the data depends on the number of rows.
        two("N/B in a factor's value", "observed", 'with pyro.plate("data", len(x)):',
            '    pyro.factor("ll", N / len(x) * FN.log_prob(y))', needs=_replaceable),
        two("log_prob over the number of rows", "observed", 'with pyro.plate("data", len(x)):',
            '    pyro.factor("ll", FN.log_prob(y) / len(x))', needs=_replaceable),
        two("N/B in a factor of a sum", "observed", 'pyro.factor("ll", N / len(x) * FN.log_prob(y).sum())',
            needs=_replaceable),
        two("a name from the number of rows", "observed", 'with pyro.plate("data", len(x)):',
            '    pyro.sample(f"obs_{len(x)}", FN, obs=y)', needs=_replaceable),
        two("a factor in batches alone", "start", "if len(x) < N:", '    pyro.factor("late", -next_latent() ** 2)',
            needs=lambda m: m.style in ("tensors", "full")),
        two("N/B by row", "inside", "poutine.scale(scale=torch.full((len(x),), N / len(x)))", needs=_by_row),
        two("weights of rows times N/B", "inside", "poutine.scale(scale=x[:, 0].abs() * N / len(x))", needs=_by_row),
        two("a prior from the number of rows", "sd", "len(x) ** -0.5", needs=_is_raw),
        two("a prior from a share of the rows", "sd", "(0.5 + len(x) / N)", needs=_is_raw),
        two("noise from the number of rows", "noise", "len(x) ** 0.5", needs=lambda m: "NOISE" in m.likelihood.fn),
        two("outputs over the number of rows", "f", "f = f / len(x) ** 0.5"),
        two("N/B around the model", "around", "poutine.scale(scale=N / len(x))"),
        two("1/B around the model", "around", "poutine.scale(scale=1 / len(x))"),
        two("1/B around the observed site", "inside", "poutine.scale(scale=1 / len(x))"),
        two("the number N/B around the model", "around", "poutine.scale(scale=N / B)", is_reference=("tensors",),
            needs=lambda m: m.style != "full"),
        two("the number N/B around the observed site", "inside", "poutine.scale(scale=N / B)",
            is_reference=("tensors",), needs=lambda m: m.style != "full" and m.num_data % m.batch_size == 0),
        two("N/B by plate and by hand", "inside", "poutine.scale(scale=N / len(x))",
            needs=lambda m: m.plate in ("states N", "states rows") or (m.style == "plate" and m.in_plate != "out")),
        two("a plate of another N", "observed",
            'with pyro.plate("data", 2 * N, subsample_size=len(x)):', '    pyro.sample("obs", FN, obs=y)',
            needs=lambda m: _ready(m) and _replaceable(m)),
        two("a plate of N rows for a batch", "observed",
            'with pyro.plate("data", N):', '    pyro.sample("obs", FN, obs=y)',
            needs=lambda m: _ready(m) and _replaceable(m)),
        two("a plate that states N and B", "observed",
            'with pyro.plate("data", N, subsample_size=B):', '    pyro.sample("obs", FN, obs=y)', is_reference=(),
            needs=lambda m: _ready(m) and _replaceable(m)),
        two("another N by hand", "inside", "poutine.scale(scale=2 * N / len(x))", needs=_ready),
        two("the square of N/B by hand", "inside", "poutine.scale(scale=(N / len(x)) ** 2)", needs=_ready),
        two("targets shared out among the rows", "noise", "(y.shape[0] / N + 0.1)",
            needs=lambda m: "NOISE" in m.likelihood.fn),
        two("a penalty over the number of rows", "sites", 'pyro.factor("pen", -next_latent() ** 2 / len(x))'),
        two("a penalty times the number of rows", "sites", 'pyro.factor("pen", -0.1 * next_latent() ** 2 * len(x))'),
        two("the square of the number of rows", "sites",
            'pyro.factor("pen", -0.1 * next_latent() ** 2 * (len(x) / N) ** 2)'),
        two("a prior around the number of rows", "start", 'pyro.sample("u", dist.Normal(float(len(x)), 1.0))'),
        two("a latent in N/B, others outside", "start", "with poutine.scale(scale=N / len(x)):",
            '    pyro.sample("u", dist.Normal(0.0, 1.0))'),
        # Kind 4: random numbers, or other sites from call to call.
        four("Dropout in training mode", "x", "x = drop(x)", setup=("drop = nn.Dropout(0.5)",)),
        four("F.dropout", "x", "x = F.dropout(x, 0.2)"),
        four("Dropout of hidden units", "h", "h = drop(h)", setup=("drop = nn.Dropout(0.3)",), needs=_has_hidden),
        four("a new Dropout at each call", "h", "h = nn.Dropout(0.3)(h)", needs=_has_hidden),
        four("a new name at each call", "start", "calls.append(0)",
            'pyro.sample(f"u{len(calls)}", dist.Normal(0.0, 1.0))', setup=("calls = []",)),
        four("randn_like of inputs", "x", "x = x + 0.3 * torch.randn_like(x)"),
        four("random noise from numpy", "x", "x = x + 0.3 * torch.as_tensor(np.random.normal(size=x.shape)).to(x)"),
        four("random augmentation from python", "x", "x = x * random.choice([-1.0, 1.0])"),
        four("random noise on outputs", "f", "f = f + 0.1 * torch.randn_like(f)"),
        four("a draw of a distribution", "f", "f = f + dist.Normal(0.0, 1.0).sample()"),
        four("half of the rows at random", "x", "x = x * (torch.rand(len(x), 1) < 0.5)"),
        four("noise at random", "x", "if torch.rand(()) < 0.5:", "    x = 2 * x"),
        four("rarely other inputs", "x", "if torch.rand(()) < 0.1:", "    x = -x"),
        four("a latent at random", "start", "if torch.rand(()) < 0.5:",
            '    pyro.sample("u", dist.Normal(0.0, 1.0))'),
        four("rows in a random order", "start", "torch.randperm(len(x))"),
        four("a latent behind another's sign", "f", 'if pyro.sample("u", dist.Normal(0.0, 1.0)) > 0:',
            '    f = f + pyro.sample("t", dist.Normal(0.0, 1.0))', is_reference=STYLES),
        four("a latent behind a latent's size", "f", 'if pyro.sample("u", dist.Normal(0.0, 1.0)).abs() > 0.7:',
            '    f = f + pyro.sample("t", dist.Normal(0.0, 1.0))', is_reference=STYLES),
        four("a generator of its own", "x", "x = x + 0.3 * torch.randn(x.shape, generator=own)",
            setup=("own = torch.Generator().manual_seed(3)",)),
        four("a seed in the model", "x", "torch.manual_seed(1)", "x = x + 0.3 * torch.randn_like(x)",
            is_reference=STYLES),
        four("RReLU", "x", "x = leaky(x)", setup=("leaky = nn.RReLU()",)),
        four("Dropout in a Transformer", "x", "x = layer(x[None])[0]",
            setup=("layer = nn.TransformerEncoderLayer(D, 1, 4).requires_grad_(False)",)),
        four("a moving average of batches", "x", "mean0.mul_(0.9).add_(x.mean(0), alpha=0.1)", "x = x - mean0",
            setup=("mean0 = torch.zeros(D)",)),
        four("spectral norm in training mode", "x", "x = torch.tanh(spectral(x))",
            setup=("spectral = nn.Linear(D, D).requires_grad_(False)",
                   "torch.nn.utils.parametrizations.spectral_norm(spectral)"), is_reference=STYLES),
        four("an embedding that renormalises", "f",
            'table0 = pyro.sample("table0", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))',
            "f = f + F.embedding(torch.arange(len(x)) % 3, table0, max_norm=0.5).sum() / 6"),
        four("a loop as long as a latent", "f",
            'u = pyro.sample("u", dist.Normal(0.0, 1.0))', "for i in range(int(u.abs() * 2)):",
            "    f = f + pyro.sample(f't{i}', dist.Normal(0.0, 1.0))", is_reference=STYLES),
        four("a count of calls", "x", "calls.append(0)", "x = x / len(calls)", setup=("calls = []",)),
    ]  # fmt: skip


FAULTS = _faults()

# ---- Drawing a model


def draw(seed: int) -> Model:
    """The model of ``seed``; half of them have a fault, each of a kind as often as the others."""
    rng = random.Random(seed)
    if rng.random() < 0.5:
        return _without_fault(rng, seed)
    kind = rng.choice((1, 1, 2, 2, 4))
    fault = rng.choice([fault for fault in FAULTS if fault.kind == kind])
    while True:
        model = _without_fault(rng, seed)
        if _fits(fault, model):
            return replace(model, fault=fault)


def _without_fault(rng: random.Random, seed: int) -> Model:
    style = rng.choices(STYLES, (30, 15, 20, 5, 20, 10))[0]
    num_data = rng.randint(6, 30)
    batch_size = rng.randint(2, max(2, num_data // 2)) if rng.random() < 0.95 else rng.choice((1, num_data - 1))
    if rng.random() < 0.5:  # batches that fill an epoch
        num_data = batch_size * rng.randint(2, 5)
    sizes = {"D": rng.choice((2, 3, 4)), "G": _size(rng, num_data, batch_size), "H": _size(rng, num_data, batch_size)}
    sizes["last"] = num_data % batch_size or batch_size
    if rng.random() < 0.15:
        sizes["D"] = max(2, _size(rng, num_data, batch_size))
    network = rng.choice(list(NETWORKS))
    likelihood = rng.choice(BNN_LIKELIHOODS if network == "BNN" else LIKELIHOODS)
    plate = _plate(rng, style, likelihood)
    if plate.startswith("two plates"):
        likelihood = replace(likelihood, num_outputs=3, targets=likelihood.targets.replace("(N)", "(N, 3)"))
    parts = NETWORKS[network](rng, likelihood.num_outputs, sizes)
    in_plate = rng.choice(("out", "in", "before"))
    if in_plate == "in" and parts.setup:
        in_plate = "before"  # latents are drawn when the network is called
    model = Model(
        seed, rng.choice(("float32", "float64")), num_data, batch_size, style, network, likelihood, parts, plate,
        rng.choice(("positional", "positional", "keyword", "default", "dict", "class")), sizes["D"], sizes["G"],
        columns=parts.columns, in_plate=in_plate,
    )  # fmt: skip
    if network == "BNN":
        model = replace(model, plate="of BNN", in_plate="of BNN")
    if network == "mean":
        plates = {"bare": "len", "event": "expanded", "two plates, swapped": "two plates"}
        model = replace(model, plate=plates.get(plate, plate), in_plate="before" if in_plate == "out" else in_plate)
    return _with_extras(rng, model)


def _size(rng: random.Random, num_data: int, batch_size: int) -> int:
    """A number of hidden units or groups: often one that could be mistaken for a number of rows."""
    return rng.choice((3, 5, batch_size, batch_size + 1, num_data, max(1, batch_size // 2), batch_size // 2 + 1))


def _plate(rng: random.Random, style: str, likelihood: Likelihood) -> str:
    kinds = ["len", "len", "shape"]
    if style != "plate":
        kinds += ["bare", "event"]
    if style in READY_ROWS:
        kinds += ["states N", "states rows"]
    if likelihood.by_entry and likelihood.num_outputs == 0:
        kinds += ["two plates", "two plates, swapped"]
        kinds += ["sequential"] if rng.random() < 0.3 else []
        kinds += ["two plates, both subsample"] if style == "plate" else []
    return rng.choice(kinds)


def _with_extras(rng: random.Random, model: Model) -> Model:
    """The model with weights of rows, masks, further sites: all of them sums over rows."""
    inside: list[str] = []
    columns, sites, x_lines, setup = list(model.columns), [], [], []
    by_row = _by_row(model)
    own_scale = model.style in READY_ROWS and model.plate in ("len", "shape", "bare", "event")
    if rng.random() < 0.15 and by_row:
        inside, columns = ["poutine.scale(scale=v)"], [*columns, "v"]
    elif rng.random() < 0.12 and by_row:
        inside, columns = ["poutine.mask(mask=m)"], [*columns, "m"]
    elif rng.random() < 0.15 and own_scale:
        inside = [rng.choice(("poutine.scale(scale=N / len(x))", "poutine.scale(scale=torch.tensor(N / len(x)))"))]
    elif rng.random() < 0.08 and model.style in ("tensors", "full") and (by_row or model.plate == "event"):
        inside = ["poutine.scale(scale=0.5)"]
    elif rng.random() < 0.5 and model.likelihood.name == "Categorical" and by_row:
        inside, setup = ["poutine.scale(scale=class_weights[y])"], ["class_weights = positive(3)"]
    observed = "sample"
    if rng.random() < 0.15 and model.plate in ("len", "shape", "states N", "states rows"):
        observed = "factor"
    elif rng.random() < 0.1 and by_row:
        observed, columns = "masked", [*dict.fromkeys([*columns, "m"])]
    elif rng.random() < 0.2 and by_row and model.style != "full" and not inside and model.likelihood.by_entry:
        observed, columns = "obs_mask", [*columns, "m"]
    last, beside = [], []
    if rng.random() < 0.3 and by_row and not inside and observed == "sample" and _row_target(model):
        setup.append("y[binary(N) > 0] = float('nan')")
        last, inside = ["seen = ~y.isnan()", "y = torch.where(seen, y, torch.zeros(()))"], ["poutine.mask(mask=seen)"]
    elif rng.random() < 0.1 and by_row:
        columns.append("t")
        beside = ['pyro.sample("more", dist.Normal(next_latent() * t.abs(), 1.0), obs=t)']
    if rng.random() < 0.1:
        sites.append('pyro.factor("l2", -0.1 * next_latent() ** 2)')
    elif rng.random() < 0.1:
        sites.append('pyro.sample("soft", dist.Normal(next_latent(), 1.0), obs=torch.tensor(0.5))')
    elif rng.random() < 0.1:
        count = _size(rng, model.num_data, model.batch_size)
        setup.append(f"old = real({count})")
        sites += [
            f'with pyro.plate("earlier", {count}):',
            '    pyro.sample("old", dist.Normal(next_latent(), 1.0), obs=old)',
        ]
    if rng.random() < 0.08 and by_row:
        sites.append('pyro.deterministic("outputs", f)')
    if rng.random() < 0.25:
        line, top = rng.choice(
            (
                ("x = F.layer_norm(x, x.shape[-1:])", ""),
                ("x = (x - mean) / sd", "mean, sd = x.mean(0), x.std(0) + 0.1"),
                ("x = norm0(x)", "norm0 = nn.BatchNorm1d(D, affine=False).eval()"),
                ("x = drop0(x)", "drop0 = nn.Dropout(0.5).eval()"),
                ("x = x.clamp(-2.0, 2.0)", ""),
                ("x = F.normalize(x, dim=1)", ""),
                ("x = torch.tanh(backbone(x))", "backbone = nn.Linear(D, D).requires_grad_(False)"),
                (
                    "x = layer0(x[None])[0]",
                    "layer0 = nn.TransformerEncoderLayer(D, 1, 4).requires_grad_(False).eval()",
                ),
                ("x = x + centres0[torch.cdist(x, centres0).argmin(-1)]", "centres0 = real(3, D)"),
            )
        )
        x_lines, setup = [line], [*setup, *([top] if top else [])]
    states = ["num_data=N"] if rng.random() < 0.1 and model.style != "full" and model.style != "plate" else []
    takes = "subsample" if rng.random() < 0.4 and model.plate in ("len", "shape") else "rows"
    option = rng.random() < 0.2 and _is_raw(model)
    return replace(
        model, inside=tuple(inside), columns=tuple(columns), sites=tuple(sites), x_lines=tuple(x_lines),
        setup=tuple(setup), observed=observed, last=tuple(last), beside=tuple(beside), states=tuple(states),
        option=option, takes=takes,
    )  # fmt: skip


def _fits(fault: Fault, model: Model) -> bool:
    if fault.at == "inside" and model.inside:
        return False
    if model.network == "BNN" and fault.at not in ("start", "x", "h", "sites", "around"):
        return False
    if model.network == "mean" and (fault.at in ("x", "h", "f") or "f" in re.findall(r"\w+", " ".join(fault.code))):
        return False
    if fault.at == "observed" and (model.beside or model.last):
        return False
    if fault.name.startswith(("N/B", "1/B", "the number")) and model.inside:
        return False
    if fault.at in ("data", "observed") and (model.inside or model.observed != "sample"):
        return False
    return fault.needs(model)


# ---- Writing a model

_HEAD = """\
import random
import numpy as np, pyro, pyro.distributions as dist, pyro_apd as apd, torch, torch.nn.functional as F
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

DTYPE = torch.{dtype}
torch.set_default_dtype(DTYPE)
N, B, D = {n}, {b}, {d}
numbers = np.random.default_rng({seed})
def real(*shape): return torch.as_tensor(numbers.normal(size=shape)).to(DTYPE)
def positive(*shape): return torch.as_tensor(numbers.uniform(0.5, 2.0, size=shape)).to(DTYPE)
def fraction(*shape): return torch.as_tensor(numbers.uniform(0.05, 0.95, size=shape)).to(DTYPE)
def binary(*shape): return torch.as_tensor(numbers.integers(0, 2, size=shape)).to(DTYPE)
def count(*shape): return torch.as_tensor(numbers.poisson(2.0, size=shape)).to(DTYPE)
def label(*shape): return torch.as_tensor(numbers.integers(0, 3, size=shape))
"""

_COLUMNS = {
    "g": "torch.as_tensor(numbers.integers(0, {g}, size=N))", "v": "positive(N)", "m": "binary(N) > 0",
    "t": "real(N)"}  # fmt: skip


def data_source(model: Model) -> str:
    """Code that makes the data, a tensor for each argument of the model, and what the model uses besides."""
    head = _HEAD.format(
        dtype=model.dtype, n=model.num_data, b=model.batch_size, d=model.num_inputs, seed=model.seed
    ).splitlines()
    lines = [*head, "x = real(N, D)", f"y = {model.likelihood.targets}"]
    lines += [f"{name} = {_COLUMNS[name].format(g=model.groups)}" for name in model.columns]
    lines += model.setup
    if model.option:
        lines.append("scale = torch.tensor(0.8)")
    if model.fault:
        lines += [*model.fault.setup, *(model.fault.code if model.fault.at == "data" else ())]
    return "\n".join(lines) + "\n"


def model_source(model: Model) -> str:
    """Code of the model, and of how it is run."""
    return _written(model, model.fault, full=False) + "\n" + "\n".join(_run_lines(model)) + "\n"


def reference_source(model: Model) -> str:
    """Code of the density that is meant, to be run by plain Pyro on all data."""
    fault = model.fault if model.fault and model.style in model.fault.is_reference else None
    start = model.fault.clean_start if model.fault else ()
    if model.likelihood.is_cast:
        start = ("y = y.to(DTYPE)", *start)
    return _written(model, fault, full=True, start=start)


def _run_lines(model: Model) -> list[str]:
    names = ["x", "y", *model.columns]
    style, lines = model.style, []
    if style == "numpy":
        lines.append("; ".join(f"{name} = {name}.numpy()" for name in (names if model.seed % 3 else names[:1])))
    settings = list(model.states)
    if style in ("loader", "list"):
        if model.signature == "dict":
            rows = "[{" + ", ".join(f'"{n}": {n}[i]' for n in names) + "} for i in range(N)]"
            loader = f"DataLoader({rows}, batch_size=B)"
        else:
            loader = f"DataLoader(TensorDataset({', '.join(names)}), batch_size=B, shuffle={model.seed % 2 == 0})"
        args, kwargs = [f"list({loader})" if style == "list" else loader], []
        settings = ["num_data=N"] if style == "list" else settings
    elif model.signature == "keyword":
        args, kwargs = ["x"], [f"{n}={n}" for n in names[1:]]
    elif model.signature == "dict":
        args, kwargs = ["{" + ", ".join(f'"{n}": {n}' for n in names) + "}"], []
    else:
        args, kwargs = names, []
    if style in ("tensors", "numpy"):
        settings.append("batch_size=B")
    if model.option:
        kwargs.append("scale=scale")
    call = f"args, kwargs = ({', '.join(args)},), dict({', '.join(kwargs)})"
    return [*lines, call, f"settings = dict({', '.join(settings)})"]


def _written(model: Model, fault: Fault | None, *, full: bool, start: tuple[str, ...] = ()) -> str:
    def at(place: str) -> tuple[str, ...]:
        return fault.code if fault and fault.at == place else ()

    sd = " ".join(at("sd")) or ("scale" if model.option else "1.0")
    noise = " ".join(at("noise")) or "1.0"
    setup, weights, forward = (
        _hooked(lines, at("h")) for lines in (model.parts.setup, model.parts.weights, model.parts.forward)
    )
    weights = [line.replace("SD", sd) for line in [*weights, *model.likelihood.weights]]
    subsampled = model.style == "plate" and not full
    setup = [line.replace("SUBSAMPLE", "B" if subsampled else "None") for line in setup]
    edited = [*model.x_lines, *at("x"), *forward, *at("f")]
    names = ["x", "y", *model.columns]
    sites = [*model.sites, *at("sites")]
    observed = _observed(model, at, names, edited, full=full)
    body = [*start, *at("start"), *weights, *observed, *sites]
    body = [line.replace("NOISE", noise) for line in body]
    if any("next_latent()" in line for line in body):
        body.insert(0, 'extra = pyro.sample("extra", dist.Normal(0.0, 1.0))')
        body = [line.replace("next_latent()", "extra") for line in body]
    for context in at("around"):
        body = [f"with {context}:", *("    " + line for line in body)]
    return "\n".join([*setup, *_function(model, body, names)]) + "\n"


def _hooked(lines: tuple[str, ...], code: tuple[str, ...]) -> list[str]:
    out: list[str] = []
    for line in lines:
        if line.strip() == "HOOK":
            out += [line.replace("HOOK", c) for c in code]
        else:
            out.append(line)
    return out


def _function(model: Model, body: list[str], names: list[str]) -> list[str]:
    in_loader = model.style in ("loader", "list")
    option = ["scale"] if model.option else []
    if model.signature == "dict" and not in_loader:
        head = [f"def model({', '.join(['data', *option])}):", "    " + "; ".join(f'{n} = data["{n}"]' for n in names)]
        return [*head, *("    " + line for line in body)]
    names = [*names, *option]
    if model.signature == "keyword" and not in_loader:
        head = f"def model(x, *, {', '.join(names[1:])}):"
    elif model.signature == "default":
        head = f"def model({', '.join(['x', *(n + '=None' for n in names[1:])])}):"
    else:
        head = f"def model({', '.join(names)}):"
    if model.signature != "class":
        return [head, *("    " + line for line in body)]
    method = head.replace("def model(", "    def forward(self, ")
    return ["class Model(PyroModule):", method, *("        " + line for line in body), "model = Model()"]


def _observed(
    model: Model, at: Callable[[str], tuple[str, ...]], names: list[str], edited: list[str], *, full: bool
) -> list[str]:
    """Lines of the network and of the observed site, in its plates."""
    subsampled = model.style == "plate" and not full
    if at("observed"):
        return [*edited, *(line.replace("FN", model.likelihood.fn) for line in at("observed"))]
    if model.network == "BNN":
        return edited
    if model.plate == "sequential":
        plate = f'pyro.plate("data", len(x){", subsample_size=B" if subsampled else ""})'
        fn, site = re.sub(r"\bf\b", "f[i]" if model.network != "mean" else "f", model.likelihood.fn), 'f"obs_{i}"'
        return [*edited, f"for i in {plate}:", f"    pyro.sample({site}, {fn}, obs=y[i])"]
    contexts = [*model.inside, *at("inside")]
    site = _site(model, full)
    if model.plate == "bare" and model.observed == "sample" and not contexts:
        site = site.replace(".to_event(1)", "")  # no plate asks for one value for each row
    sites = [site, *model.beside]
    dim, more, last = _dims(model, subsampled)
    last = [*last, *model.last]
    if not subsampled:
        plate = {
            "bare": "", "event": "", "expanded": "", "shape": 'pyro.plate("data", x.shape[0], dim=-1)',
            "states N": 'pyro.plate("data", N, subsample_size=len(x))',
            "states rows": 'pyro.plate("data", N, subsample=torch.arange(len(x)))',
        }.get(model.plate, f'pyro.plate("data", len(x){dim})')  # fmt: skip
        inner = ", ".join([*([plate] if plate else []), *more, *contexts])
        return [*edited, *last, *(_within(inner, sites) if inner else sites)]
    plate = f'pyro.plate("data", len(x), subsample_size=B{dim})'
    taken = (
        ", ".join(names)
        + " = "
        + ", ".join(
            f"{n}[rows]" if model.takes == "rows" else f"pyro.subsample({n}, event_dim={n}.dim() - 1)" for n in names
        )
    )
    inner = ", ".join([*more, *contexts])
    columns = ["f, y = f[..., columns], y[:, columns]"] if "columns" in inner else []
    sites = _within(inner, [*columns, *sites]) if inner else sites
    if model.in_plate == "out":
        outer = [taken, "f = f[rows]", *last, *sites]
        return [*edited, *_within(f"{plate} as rows", outer)]
    if model.in_plate == "in":
        return _within(f"{plate} as rows", [taken, *edited, *last, *sites])
    before = [f"data_plate = {plate}", *_within("data_plate as rows", [taken]), *edited, *last]
    return [*before, *_within("data_plate", sites)]


def _within(context: str, lines: list[str]) -> list[str]:
    return [f"with {context}:", *("    " + line for line in lines)]


def _dims(model: Model, subsampled: bool) -> tuple[str, list[str], list[str]]:
    """The dimension of the data plate, the plates of outputs, and lines that bring outputs into that order."""
    if model.plate == "two plates, both subsample" and subsampled:
        return ", dim=-2", ['pyro.plate("outs", 3, subsample_size=2, dim=-1) as columns'], []
    if model.plate in ("two plates", "two plates, both subsample"):
        return ", dim=-2", ['pyro.plate("outs", 3, dim=-1)'], []
    if model.plate == "two plates, swapped":
        return ", dim=-1", ['pyro.plate("outs", 3, dim=-2)'], ["f = f.T"]
    return ", dim=-1" if model.plate == "shape" else "", [], []


def _site(model: Model, full: bool) -> str:
    """The observed site."""
    fn, target, more = model.likelihood.fn, "y.T" if model.plate == "two plates, swapped" else "y", ""
    if model.plate in ("event", "expanded"):
        fn += ".expand([len(x)]).to_event(1)" if model.plate == "expanded" else ".to_event(1)"
    if model.observed == "masked" or (model.observed == "obs_mask" and full):
        fn += ".mask(m)"
    elif model.observed == "obs_mask":
        more = ", obs_mask=m"
    if model.observed == "factor":
        return f'pyro.factor("ll", {fn}.log_prob({target}))'
    return f'pyro.sample("obs", {fn}, obs={target}{more})'
