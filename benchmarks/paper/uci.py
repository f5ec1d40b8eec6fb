# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Regression on four UCI sets, beside published results for the standard splits.

One hidden layer of 50 units, a learned noise scale, everything standardised by the training rows of the split; results
are in the targets' own unit. The log-likelihood is that of the mixture over draws. Settings are the same for all sets
and splits, with two exceptions. The sampler's step size is found automatically. And there are two priors, one that
narrows with a layer's inputs and one with standard deviation 0.5 everywhere: each split uses the one under which
shorter chains on nine tenths of its training rows give the other rows the higher log-likelihood. The best published
results also come from a grid search.

Both protocols run the same: the paper has no regression. The sets are read from ``uci/`` in the folder named by
``PYRO_APD_DATA``; without it, and with the smoke budget, a line with noise replaces them.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pyro_apd as apd
from benchmarks.common import markdown_table
from benchmarks.distillation_cases import Problem, network
from benchmarks.distillation_cases import uci as uci_case
from benchmarks.paper.common import Options, Results, data_root, warnings_noted
from benchmarks.paper.registry import Experiment
from pyro_apd.runtime.global_state import seeded

SETS = ("concrete", "energy", "wine-quality-red", "yacht")
#: Root mean squared error and log-likelihood as published: with a standard deviation, PBP with a standard error
#: (Lakshminarayanan et al. 2017, table 1); and MC-dropout after a grid search, with a standard error.
PUBLISHED: dict[str, dict[str, tuple[str, str]]] = {
    "concrete": {
        "PBP": ("5.67 ± 0.09", "-3.16 ± 0.02"),
        "MC-dropout": ("5.23 ± 0.53", "-3.04 ± 0.09"),
        "deep ensembles": ("6.03 ± 0.58", "-3.06 ± 0.18"),
        "MC-dropout, grid search": ("4.83 ± 0.16", "-2.94 ± 0.03"),
    },
    "energy": {
        "PBP": ("1.80 ± 0.05", "-2.04 ± 0.02"),
        "MC-dropout": ("1.66 ± 0.19", "-1.99 ± 0.09"),
        "deep ensembles": ("2.09 ± 0.29", "-1.38 ± 0.22"),
        "MC-dropout, grid search": ("0.54 ± 0.01", "-1.21 ± 0.01"),
    },
    "wine-quality-red": {
        "PBP": ("0.64 ± 0.01", "-0.97 ± 0.01"),
        "MC-dropout": ("0.62 ± 0.04", "-0.93 ± 0.06"),
        "deep ensembles": ("0.64 ± 0.04", "-0.94 ± 0.12"),
        "MC-dropout, grid search": ("0.62 ± 0.01", "-0.93 ± 0.01"),
    },
    "yacht": {
        "PBP": ("1.02 ± 0.05", "-1.63 ± 0.02"),
        "MC-dropout": ("1.11 ± 0.38", "-1.55 ± 0.12"),
        "deep ensembles": ("1.58 ± 0.48", "-1.18 ± 0.21"),
        "MC-dropout, grid search": ("0.67 ± 0.05", "-1.25 ± 0.01"),
    },
}
METHODS = ("SGLD", "APD")
#: Prior scales, of which each split uses one.
PRIORS: tuple[str | float, ...] = ("fan_in", 0.5)


def run(options: Options, results: Results) -> None:
    """Samples and distils on every split."""
    names = SETS if data_root() is not None and not options.is_smoke else ("line",)
    splits = options.seeds_or((0,), range(2), range(20))
    # Split by split, so that after an interrupt all sets have some results.
    results.run((f"{name}/{split}", partial(one_split, name, split, options)) for split in splits for name in names)


def one_split(name: str, split: int, options: Options) -> dict[str, Any]:
    """Metrics of the chain and of the generator."""
    with seeded(split):
        problem, unit = make_problem(name, split)
    start = time.monotonic()
    prior_scale = chosen_prior(problem, split, options)
    problem, chosen_at = with_prior(problem, prior_scale), time.monotonic()
    with warnings_noted() as notes:
        draws = sampled(problem, split, options, options.by_budget((2, 20), (50, 400), (50, 400)))
        sampled_at = time.monotonic()
        settings = {"num_steps": options.by_budget(5, None, None), "seed": split, "group_by_chain": True}
        posterior = apd.distill(draws, problem.model, data=problem.train, progress=False, **settings)
    finished = time.monotonic()
    pooled = {site: value.flatten(0, 1) for site, value in draws.items()}
    found = {"SGLD": figures(problem, pooled, unit), "APD": figures(problem, posterior.get_samples(500, seed=0), unit)}
    seconds = {
        "choosing_seconds": round(chosen_at - start, 1),
        "sampling_seconds": round(sampled_at - chosen_at, 1),
        "distilling_seconds": round(finished - sampled_at, 1),
    }
    networks = posterior.num_bytes / (4 * posterior.layout.size)
    return {**found, **seconds, "prior_scale": prior_scale, "networks": networks, "notes": notes}


def make_problem(name: str, split: int) -> tuple[Problem, float]:
    """The split, standardised, and the targets' unit."""
    if name == "line":
        x = torch.linspace(-2, 2, 60).unsqueeze(1)
        y = x.squeeze(1) + 0.3 * torch.randn(60)
        model = apd.BNN(network(1, 8, 1), likelihood="gaussian", prior_scale="fan_in")
        return Problem(model, (x[::2], y[::2]), (x[1::2], y[1::2]), {}), 1.0
    problem = uci_case(name)(split)
    table = np.loadtxt(f"{data_root()}/uci/{name}.txt")
    state = np.random.RandomState(1)
    for _ in range(split + 1):
        order = state.choice(range(len(table)), len(table), replace=False)
    return problem, float(table[order[: round(0.9 * len(table))], -1].std())


def chosen_prior(problem: Problem, seed: int, options: Options) -> str | float:
    """The prior scale under which chains on nine tenths of the training rows predict the others best."""
    x, y = problem.train
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held_out, kept = order[: len(x) // 10], order[len(x) // 10 :]
    inner = replace(problem, train=(x[kept], y[kept]), test=(x[held_out], y[held_out]))
    found: dict[str | float, float] = {}
    for prior_scale in PRIORS:
        tried = with_prior(inner, prior_scale)
        with warnings_noted():
            # Much shorter chains have not reached the width that a wide prior allows, and would wrongly reject it.
            draws = sampled(tried, seed, options, options.by_budget((2, 20), (20, 200), (20, 200)))
        pooled = {site: value.flatten(0, 1) for site, value in draws.items()}
        found[prior_scale] = figures(tried, pooled, 1.0)["log_likelihood"]
    return max(found, key=found.__getitem__)


def with_prior(problem: Problem, prior_scale: str | float) -> Problem:
    """The problem under another prior."""
    num_hidden, num_inputs = problem.model.net[0].weight.shape
    net = network(num_inputs, num_hidden, 1)
    return replace(problem, model=apd.BNN(net, likelihood="gaussian", prior_scale=prior_scale))


def sampled(problem: Problem, seed: int, options: Options, length: tuple[int, int]) -> dict[str, Tensor]:
    """Draws of four chains of SGLD that advance together, ``(C, S, ...)``; ``length`` in steps per draw, and draws."""
    thinning, num_draws = length
    warmup = options.by_budget(10, 200, 200)
    kernel = apd.SGLD(
        problem.model,
        "auto",
        batch_size=min(100, len(problem.train[0])),
        thinning=thinning,
        warm_start=options.by_budget(20, 2000, 2000),
        seed=seed,
        compile=False,
    )
    settings = {"num_chains": 4, "chain_method": "vectorized", "disable_progbar": True}
    mcmc = apd.MCMC(kernel, num_draws, warmup_steps=warmup, **settings)
    mcmc.run(*problem.train)
    draws: dict[str, Tensor] = mcmc.get_samples(group_by_chain=True)
    return draws


def figures(problem: Problem, draws: dict[str, Tensor], unit: float) -> dict[str, float]:
    """Root mean squared error of the average, and log-likelihood of the mixture, in the targets' unit."""
    x, y = problem.test
    mean_N = apd.reduce_outputs(problem.model, draws, x, names="mean")["mean"]
    log_prob_SN = apd.log_likelihood(problem.model, draws, x, y).double()
    log_mean_N = log_prob_SN.logsumexp(0) - math.log(len(log_prob_SN))
    return {
        "rmse": unit * float((mean_N - y).square().mean().sqrt()),
        "log_likelihood": float(log_mean_N.mean()) - math.log(unit),
    }


def table(options: Options, results: Results) -> str:
    """Means over splits with standard errors, beside published results."""
    rows = []
    for name in dict.fromkeys(key.split("/")[0] for key in results.figures):
        found = list(results.under(name).values())
        for method in METHODS:
            cells = [_with_error([one[method][figure] for one in found]) for figure in ("rmse", "log_likelihood")]
            wide = sum(one["prior_scale"] != PRIORS[0] for one in found)
            rows.append([name, method, *cells, str(len(found)), str(wide)])
        for method, cells in PUBLISHED.get(name, {}).items():
            rows.append([name, f"{method} (published)", *cells, "20", ""])
    note = "Mean ± standard error over splits; published: PBP and grid search ± standard error, others ± sd."
    head = ["set", "method", "RMSE", "log-likelihood", "splits", f"of them with prior {PRIORS[1]}"]
    return f"### UCI regression, {options.budget} budget\n\n{note}\n\n{markdown_table(head, rows)}"


def _with_error(values: list[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.2f}"
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return f"{mean:.2f} ± {math.sqrt(variance / len(values)):.2f}"


EXPERIMENT = Experiment(run, table)
