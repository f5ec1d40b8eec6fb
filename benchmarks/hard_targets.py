# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""``step_size="auto"`` on posteriors that are hard for it: funnels, learned scales, heavy tails.

Run ``python -m benchmarks.hard_targets [--quick] [--only NAME ...] [--kernels NAME ...]``.

All have a reference: in closed form, by quadrature in one dimension, or by importance sampling from a Student t around
the mode, whose effective size is checked. Every kernel runs with nothing set but a seed: four chains from draws of the
prior, 2,000 Langevin steps of warm-up and 10,000 kept. A run is ``right`` where every mean is within 0.1 sd and every
sd within 15 %, else ``warned`` if it said something, else ``silently wrong``.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

import pyro_apd as apd
from benchmarks.common import markdown_table, read_json, write_json
from benchmarks.posteriordb_auto import KERNELS
from benchmarks.tuning import TracedPotential
from pyro_apd.errors import DivergenceError
from pyro_apd.kernels.engine.chain_set import ChainSet

NUM_CHAINS, NUM_DRAWS, NUM_WARMUP, THINNING = 4, 500, 100, 20
MAX_MEAN_ERROR, MAX_SD_ERROR = 0.1, 0.15
# Draws of importance sampling, how many of them at once, and the effective size that is asked for.
_NUM_WEIGHTED, _BLOCK, _MIN_WEIGHTED = 200_000, 20_000, 10_000
Moments = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Target:
    """A posterior with known moments.

    :ivar model: the Pyro model, and ``args``, its arguments.
    :ivar scalars: from draws ``(S, ...)`` by site to scalars ``(S,)`` by name.
    :ivar exact: mean and sd of each; None for importance sampling.
    :ivar batch_size: rows per mini-batch; None for all.
    """

    model: Callable[..., Any]
    args: tuple[Tensor, ...]
    scalars: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    exact: Callable[[], Moments] | None = None
    batch_size: int | None = None

    def reference(self) -> Moments:
        """Mean and sd of each scalar."""
        return weighted_moments(self) if self.exact is None else self.exact()


def weighted_moments(target: Target, freedom: float = 4.0) -> Moments:
    """By importance sampling.

    :raises RuntimeError: if the effective number of draws is too small to be a reference.
    """
    traced = TracedPotential(target.model, target.args, {})
    spread = 1.2 * torch.linalg.cholesky(torch.linalg.inv(traced.hessian(traced.mode)))
    generator = torch.Generator().manual_seed(0)
    size = len(spread)
    normal = torch.randn(_NUM_WEIGHTED, size, generator=generator)
    scale = torch.distributions.Chi2(torch.tensor(freedom))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heavy = (scale.sample((_NUM_WEIGHTED, 1)) / freedom).rsqrt()
    at = normal * heavy
    log_proposal = -0.5 * (freedom + size) * torch.log1p(at.square().sum(-1) / freedom)
    thetas = traced.mode + at @ spread.T
    kernel = apd.SGLD(target.model, 1.0, init_strategy=traced.init, seed=0)
    chain = kernel.begin(target.args, {}, warmup_steps=1, chains=ChainSet(count=_BLOCK))
    batch = chain.potential.source.draw()
    energy = torch.cat([chain.estimator.gradient(block, batch)[1].clone() for block in thetas.split(_BLOCK)])
    log_weights = -energy - log_proposal
    weights = (log_weights - log_weights.max()).exp()
    weights /= weights.sum()
    effective = 1 / float(weights.square().sum())
    if not effective > _MIN_WEIGHTED:
        raise RuntimeError(f"Importance sampling has {effective:.0f} effective draws; {_MIN_WEIGHTED} are needed.")
    values = target.scalars(traced.layout.constrain(thetas))
    means = {name: float(weights @ value) for name, value in values.items()}
    return {name: (means[name], float(weights @ (v - means[name]).square()) ** 0.5) for name, v in values.items()}


# -- targets -----------------------------------------------------------------------------------------------------------


def _rows(num: int, width: int) -> Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(7))


def _standard(num: int) -> Tensor:
    return torch.randn(num, generator=torch.Generator().manual_seed(8))


def by_entry(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every entry of every site."""
    flat = {name: value.reshape(len(value), -1) for name, value in draws.items()}
    return {f"{name}[{i}]": value[:, i] for name, value in flat.items() for i in range(value.shape[1])}


def _logs_of(*names: str) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    return lambda draws: by_entry({k: v.log() if k in names else v for k, v in draws.items()})


def funnel() -> Target:
    """Neal (Annals of Statistics, 2003), section 8: a scale over six orders of magnitude, v of sd 3."""

    def model() -> None:
        v = pyro.sample("v", dist.Normal(torch.tensor(0.0), 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(9), (v / 2).exp().unsqueeze(-1)).to_event(1))

    return Target(model, (), lambda draws: {"v": draws["v"]}, lambda: {"v": (0.0, 3.0)})


def horseshoe() -> Target:
    """Ten normal means under local scales with half-Cauchy priors; each is an integral in one dimension."""
    y = torch.tensor([0.0, 0.2, -0.5, 1.0, -1.5, 2.0, 3.0, -4.0, 6.0, 10.0])

    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.HalfCauchy(torch.ones(10)).to_event(1))
        with pyro.plate("rows", len(y)):
            theta = pyro.sample("theta", dist.Normal(0.0, scale))
            pyro.sample("obs", dist.Normal(theta, 1.0), obs=y)

    def exact() -> Moments:
        log_scale = torch.linspace(-15.0, 15.0, 20_001)
        square = (2 * log_scale).exp()
        found = {}
        for i, value in enumerate(y):
            log_density = log_scale - torch.log1p(square) - 0.5 * torch.log1p(square) - 0.5 * value**2 / (1 + square)
            weights = (log_density - log_density.max()).exp()
            weights /= weights.sum()
            shrunk = square / (1 + square)
            mean = float(weights @ (value * shrunk))
            found[f"theta[{i}]"] = (mean, float(weights @ (shrunk + (value * shrunk) ** 2) - mean**2) ** 0.5)
            middle = float(weights @ log_scale)
            found[f"scale[{i}]"] = (middle, float(weights @ (log_scale - middle) ** 2) ** 0.5)
        return found

    return Target(model, (y,), _logs_of("scale"), exact)


def centred_schools() -> Target:
    """Eight schools with centred effects: a funnel that data cut off; given tau all is Gaussian."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sd = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(y: Tensor, sd: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(5.0)))
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("obs", dist.Normal(theta, sd), obs=y)

    def exact() -> Moments:
        log_tau = torch.linspace(-14.0, 7.0, 20_001)
        square = (2 * log_tau).exp()
        total = sd.square() + square.unsqueeze(-1)
        precision = 1 / 25 + (1 / total).sum(-1)
        centre = (y / total).sum(-1) / precision
        log_density = -0.5 * total.log().sum(-1) - 0.5 * (y**2 / total).sum(-1) + 0.5 * precision * centre**2
        log_density = log_density - 0.5 * precision.log() + log_tau - torch.log1p(square / 25)
        weights = (log_density - log_density.max()).exp()
        weights /= weights.sum()
        share = square.unsqueeze(-1) / total
        mean = share * y + (1 - share) * centre.unsqueeze(-1)
        variance = share * sd.square() + (1 - share).square() / precision.unsqueeze(-1)
        parts = [(centre, 1 / precision), (log_tau, torch.zeros_like(log_tau))]
        parts += [(mean[:, i], variance[:, i]) for i in range(len(y))]
        names = ["mu[0]", "tau[0]", *(f"theta[{i}]" for i in range(len(y)))]
        found = {}
        for name, (middle, spread) in zip(names, parts, strict=True):
            overall = float(weights @ middle)
            found[name] = (overall, float(weights @ (spread + middle.square()) - overall**2) ** 0.5)
        return found

    return Target(model, (y, sd), _logs_of("tau"), exact)


def _heteroscedastic(link: Callable[[Tensor], Tensor], batch_size: int | None = None, num: int = 200) -> Target:
    """A regression on x whose noise scale depends on x too, over two orders of magnitude for ``exp``."""
    x = _rows(num, 1)[:, 0]
    y = 1 + 0.5 * x + link(-1 + x) * _standard(num)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        s = pyro.sample("s", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("data", len(x)):
            scale = link(s[..., 0] + s[..., 1] * x) + 1e-6
            pyro.sample("obs", dist.Normal(w[..., 0] + w[..., 1] * x, scale), obs=y)

    return Target(model, (x, y), by_entry, batch_size=batch_size)


def _learned_noise(batch_size: int | None) -> Target:
    """A regression on three columns with one noise scale."""
    x = _rows(200, 3)
    y = x @ torch.tensor([1.0, -0.5, 0.0]) + 0.3 * _standard(200)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 3.0).to_event(1))
        sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor(0.0), 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, sigma), obs=y)

    return Target(model, (x, y), _logs_of("sigma"), batch_size=batch_size)


def robust_regression() -> Target:
    """Student t noise of two degrees of freedom, with outliers, and priors with heavy tails."""
    x = _rows(60, 2)
    y = x @ torch.tensor([1.0, 2.0]) + 0.3 * _standard(60)
    y[:5] += 30.0

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.StudentT(3.0, torch.zeros(2), 2.5).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfCauchy(torch.tensor(1.0)))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.StudentT(2.0, x @ w, sigma), obs=y)

    return Target(model, (x, y), _logs_of("sigma"))


def separated_classes() -> Target:
    """A logistic regression on separated classes: the likelihood is flat outwards, the prior's tails are heavy."""
    x = _rows(30, 2)
    y = (x[:, 0] > 0).to(x)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.StudentT(5.0, torch.zeros(2), 2.5).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y)

    return Target(model, (x, y), by_entry)


def heavy_tails() -> Target:
    """Student t variables of five degrees of freedom, at scales from 0.1 to 10."""
    scale = torch.tensor([0.1, 0.3, 1.0, 3.0, 10.0])

    def model() -> None:
        pyro.sample("x", dist.StudentT(5.0, torch.zeros(5), scale).to_event(1))

    sds = scale * math.sqrt(5 / 3)
    return Target(model, (), by_entry, lambda: {f"x[{i}]": (0.0, float(sd)) for i, sd in enumerate(sds)})


#: By name; a function, as default dtypes are set later.
TARGETS: Mapping[str, Callable[[], Target]] = {
    "funnel": funnel,
    "horseshoe": horseshoe,
    "centred eight schools": centred_schools,
    "exp scale": lambda: _heteroscedastic(torch.exp),
    "exp scale, batches": lambda: _heteroscedastic(torch.exp, 20),
    "softplus scale": lambda: _heteroscedastic(softplus),
    "learned noise, batches": lambda: _learned_noise(20),
    "robust regression": robust_regression,
    "separated classes": separated_classes,
    "heavy tails": heavy_tails,
}


def run(name: str, kernel: str, seed: int, num_draws: int = NUM_DRAWS) -> dict[str, Any]:
    """One run: the largest mean error in sds, the sd ratio furthest from 1, and what it warned of."""
    target = TARGETS[name]()
    exact = target.reference()
    sampler = KERNELS[kernel](target.model, "auto", batch_size=target.batch_size, thinning=THINNING, seed=seed)
    mcmc = apd.MCMC(sampler, num_draws, NUM_WARMUP, num_chains=NUM_CHAINS, disable_progbar=True)
    begun, entry = time.process_time(), {"target": name, "kernel": kernel, "seed": seed}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            mcmc.run(*target.args)
        except (DivergenceError, ValueError) as error:
            said = [f"{type(error).__name__}: {error}"]
            return entry | {"seconds": time.process_time() - begun, "warnings": said, "verdict": "warned"}
    samples = mcmc.get_samples()
    if not all(len(value) for value in samples.values()):
        said = [str(w.message) for w in caught]
        return entry | {"seconds": time.process_time() - begun, "warnings": said, "verdict": "warned"}
    values = target.scalars(samples)
    errors = {n: float((values[n].mean() - mean).abs()) / sd for n, (mean, sd) in exact.items()}
    ratios = {n: float(values[n].std()) / sd for n, (_, sd) in exact.items()}
    off = max(errors, key=lambda n: errors[n])
    wide = max(ratios, key=lambda n: abs(ratios[n] - 1))
    is_right = errors[off] < MAX_MEAN_ERROR and abs(ratios[wide] - 1) < MAX_SD_ERROR
    wrong = "warned" if caught else "silently wrong"
    return entry | {
        "seconds": time.process_time() - begun,
        "step_size": float(torch.cat([*mcmc.diagnostics()["step_size"].values(), torch.tensor([math.nan])])[-2]),
        "mean_error": (off, errors[off]),
        "sd_ratio": (wide, ratios[wide]),
        "temperatures": [str(t) for t in mcmc.kernel.temperatures()],
        "warnings": [f"{type(w.message).__name__}: {w.message}" for w in caught],
        "verdict": "right" if is_right else wrong,
    }


HEADER = ["target", "kernel", "step size", "CPU s", "mean error, sd", "sd ratio", "warnings", "verdict"]


def cells(entry: Mapping[str, Any]) -> list[str]:
    """A run's row of the table."""
    kinds = ", ".join(sorted({text.split(":")[0] for text in entry["warnings"]}))
    front = [entry["target"], entry["kernel"]]
    if "step_size" not in entry:
        return [*front, "-", f"{entry['seconds']:.0f}", "-", "-", kinds, entry["verdict"]]
    (off, error), (wide, ratio) = entry["mean_error"], entry["sd_ratio"]
    numbers = [f"{entry['step_size']:.2g}", f"{entry['seconds']:.0f}", f"{error:.2f} {off}", f"{ratio:.2f} {wide}"]
    return [*front, *numbers, kinds, entry["verdict"]]


def counts(entries: Sequence[Mapping[str, Any]]) -> str:
    """Right, warned and silently wrong runs, by kernel."""
    rows = []
    for kernel in dict.fromkeys(entry["kernel"] for entry in entries):
        verdicts = [entry["verdict"] for entry in entries if entry["kernel"] == kernel]
        rows.append([kernel, *(str(verdicts.count(kind)) for kind in ("right", "warned", "silently wrong"))])
    return markdown_table(["kernel", "right", "warned", "silently wrong"], rows)


def main() -> None:
    """Prints both tables; where they are whole or resumed, writes the JSON after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="50 draws, nothing written")
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--resume", action="store_true", help="keep the runs in the JSON, and add others")
    parser.add_argument("--verbose", action="store_true", help="temperatures and warnings too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    entries = read_json("hard_targets") if options.resume else []
    is_whole = options.only == list(TARGETS) and options.kernels == list(KERNELS) and not options.quick
    known = {(entry["target"], entry["kernel"], entry["seed"]) for entry in entries}
    try:
        print(markdown_table(HEADER, [cells(entry) for entry in entries]), flush=True)
        for case in itertools.product(options.only, options.kernels, options.seeds):
            if case in known:
                continue
            entries.append(run(*case, 50 if options.quick else NUM_DRAWS))
            print("| " + " | ".join(cells(entries[-1])) + " |", flush=True)
            if options.verbose:
                print("\n".join([*entries[-1].get("temperatures", []), *entries[-1]["warnings"]]), flush=True)
            if is_whole or options.resume:
                write_json("hard_targets", entries)
    finally:
        torch.set_default_dtype(dtype)
    print(counts(entries))


if __name__ == "__main__":
    main()
