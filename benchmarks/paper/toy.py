# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The paper's figure 2: twenty points in the plane, and the surfaces of the predictions over it.

Two Gaussians of ten points, a 2-10-10-2 network, prior precision 0.02, full batches. The surface is the probability of
the second class on [-5, 5]^2. Surfaces are compared by their total variation, which for two classes is the difference
of the probabilities, averaged over the grid. The reference is NUTS on the same model.

Faithful: 10,000 steps of 2.5e-3 from PyTorch's initial weights, no burn-in, a draw every 20. Corrected: four chains
from the prior, with the CPU budget 10,000 steps of burn-in and 30,000 to draw from each, with the full one 20,000 and
100,000. The paper's generator has 32 latent numbers and width 100, as in its other experiments; its toy had 100 and 50.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.infer import MCMC, NUTS
from safetensors.torch import load_file, save_file
from torch import Tensor

import pyro_apd as apd
from benchmarks import distillation_cases
from benchmarks.common import markdown_table
from benchmarks.distillation_cases import Problem, network
from benchmarks.distillation_cases import toy as points
from benchmarks.paper.common import Options, Results, plus_minus, warnings_noted
from benchmarks.paper.registry import Experiment
from pyro_apd import baselines
from pyro_apd.runtime.global_state import seeded

STEP_SIZE, PRIOR_PRECISION = 2.5e-3, 0.02
#: Of the grid: the paper's step is 0.1.
SIDE = 101
SURFACES = ("point estimate", "SGLD", "APD, paper's generator", "APD", "NUTS")


def make_problem(seed: int, options: Options) -> Problem:
    """The points of :mod:`benchmarks.distillation_cases`, with the paper's prior."""
    with seeded(seed):
        model = apd.BNN(network(2, 10, 10, 2), likelihood="categorical", prior_scale=PRIOR_PRECISION**-0.5)
    problem = replace(points(seed), model=model.to(options.device))
    x, y = problem.train
    return replace(problem, train=(x.to(options.device), y.to(options.device)))


def grid(options: Options) -> Tensor:
    """Inputs of the surface ``(SIDE^2, 2)``; coarser with the smoke budget."""
    axis = torch.linspace(-5, 5, options.by_budget(11, SIDE, SIDE), device=options.device)
    return torch.cartesian_prod(axis, axis)


def chain(problem: Problem, seed: int, options: Options) -> dict[str, Tensor]:
    """Draws of SGLD by chain ``(C, S, ...)``."""
    if options.is_faithful:
        num_chains, thinning, warmup, num_draws = 1, 20, 0, options.by_budget(20, 500, 500)
    else:
        num_chains, thinning, warmup, num_draws = 4, *options.by_budget((5, 10, 20), (100, 100, 300), (200, 100, 500))
    start = {"init_strategy": problem.model.init_to_network} if options.is_faithful else {}
    kernel = apd.SGLD(problem.model, STEP_SIZE, thinning=thinning, seed=seed, compile=False, **start)
    mcmc = apd.MCMC(
        kernel,
        num_draws,
        warmup_steps=warmup,
        num_chains=num_chains,
        chain_method="vectorized" if num_chains > 1 else None,
        disable_progbar=True,
    )
    mcmc.run(*problem.train)
    draws: dict[str, Tensor] = mcmc.get_samples(group_by_chain=True)
    return draws


def nuts(problem: Problem, seed: int, options: Options) -> dict[str, Tensor]:
    """Draws of Pyro's NUTS, each chain from a draw of the prior, ``(S, ...)``; the same in both protocols."""
    path = distillation_cases.CACHE / "paper" / f"toy-{options.budget}-{seed}" / "nuts.draws"
    if path.exists():
        return {name: value.to(options.device) for name, value in load_file(path).items()}
    num_chains, num_draws, warmup = options.by_budget((1, 5, 5), (4, 100, 60), (4, 1000, 500))
    parts = []
    with seeded(seed):
        for _ in range(num_chains):
            kernel = NUTS(problem.model, max_tree_depth=options.by_budget(3, 6, 10))
            mcmc = MCMC(kernel, num_draws, warmup_steps=warmup, disable_progbar=True)
            mcmc.run(*problem.train)
            parts.append(mcmc.get_samples())
    draws = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous().cpu() for name, value in draws.items()}, path)
    return draws


def surface(problem: Problem, posterior: Any, options: Options) -> Tensor:
    """Probability of the second class on the grid, averaged over draws."""
    draws = posterior if isinstance(posterior, Mapping) else posterior.stream(500, seed=0)
    found = apd.reduce_outputs(problem.model, draws, grid(options), names="mean_probability")
    return found["mean_probability"][:, 1]


class Fits:
    """The posteriors of one seed; the chain is sampled once."""

    def __init__(self, seed: int, options: Options) -> None:
        self.seed, self.options = seed, options
        self.problem = make_problem(seed, options)
        self._chain: dict[str, Tensor] | None = None

    def point(self) -> dict[str, Tensor]:
        """One network."""
        num_steps = self.options.by_budget(50, 10_000, 10_000)
        model, train = self.problem.model, self.problem.train
        return baselines.map_estimate(model, *train, num_steps=num_steps, seed=self.seed, progress=False)

    def by_chain(self) -> dict[str, Tensor]:
        """The chain, ``(C, S, ...)``."""
        if self._chain is None:
            self._chain = chain(self.problem, self.seed, self.options)
        return self._chain

    def sgld(self) -> dict[str, Tensor]:
        """All draws of the chain."""
        return {name: value.flatten(0, 1) for name, value in self.by_chain().items()}

    def published(self) -> Any:
        """The paper's generator."""
        return self._distilled(generator="paper", num_steps=self.options.by_budget(5, 1000, 20_000))

    def ours(self) -> Any:
        """Ours."""
        return self._distilled(num_steps=self.options.by_budget(5, None, None))

    def nuts(self) -> dict[str, Tensor]:
        """The reference."""
        return nuts(self.problem, self.seed, self.options)

    def _distilled(self, **settings: Any) -> Any:
        settings |= {"data": self.problem.train, "seed": self.seed, "group_by_chain": True, "progress": False}
        return apd.distill(self.by_chain(), self.problem.model, **settings)


def run(options: Options, results: Results) -> None:
    """Fits, and stores the surfaces."""
    for seed in options.seeds_or((0,), (0,), (0, 1, 2, 3, 4)):
        fits = Fits(seed, options)
        work = (fits.point, fits.sgld, fits.published, fits.ours, fits.nuts)
        results.run(
            (f"{seed}/{name}", partial(fitted, fits.problem, fit, options))
            for name, fit in zip(SURFACES, work, strict=True)
            if options.wants(name)
        )


def fitted(problem: Problem, fit: Callable[[], Any], options: Options) -> dict[str, Any]:
    """A posterior's surface, size and time."""
    start = time.monotonic()
    with warnings_noted() as notes:
        posterior = fit()
    seconds = time.monotonic() - start
    is_draws = isinstance(posterior, Mapping)
    num_bytes = sum(v.numel() * 4 for v in posterior.values()) if is_draws else posterior.num_bytes
    values = [round(p, 3) for p in surface(problem, posterior, options).tolist()]
    return {"fit_seconds": round(seconds, 1), "bytes": num_bytes, "notes": notes, "surface": values}


def total_variation(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Between two surfaces, averaged over the grid."""
    return float((torch.tensor(one["surface"]) - torch.tensor(other["surface"])).abs().mean())


def table(options: Options, results: Results) -> str:
    """Total variation from NUTS and from SGLD."""
    seeds = sorted({key.split("/")[0] for key in results.figures})
    rows = []
    for name in SURFACES:
        found = [results.under(seed) for seed in seeds]
        cells = [
            plus_minus([total_variation(by[name], by[other]) for by in found if name in by and other in by])
            for other in ("NUTS", "SGLD")
        ]
        sizes = [by[name]["bytes"] / (4 * 162) for by in found if name in by]
        rows.append([name, *cells, plus_minus(sizes[:1], ".0f")])
    head = ["surface of", "TV from NUTS", "TV from SGLD", "networks kept"]
    note = f"Twenty points, mean over a grid, ± sd over {len(seeds)} seeds (points, chains and fits)."
    return f"### Toy, {options.protocol} protocol, {options.budget} budget\n\n{note}\n\n{markdown_table(head, rows)}"


def figure(options: Options, results: Results) -> list[Path]:
    """The surfaces of the first seed, side by side."""
    from matplotlib.figure import Figure

    seed = min({key.split("/")[0] for key in results.figures}, key=int)
    found = results.under(seed)
    names = [name for name in SURFACES if name in found]
    x, y = (value.numpy() for value in make_problem(int(seed), replace(options, device="cpu")).train)
    page = Figure(figsize=(2.6 * len(names) + 0.6, 3.0), layout="constrained")
    axes = page.subplots(1, len(names), squeeze=False)[0]
    for ax, name in zip(axes, names, strict=True):
        values = np.array(found[name]["surface"])
        side = round(len(values) ** 0.5)
        picture = ax.imshow(
            values.reshape(side, side).T, origin="lower", extent=(-5, 5, -5, 5), cmap="RdBu_r", vmin=0, vmax=1
        )
        ax.contour(np.linspace(-5, 5, side), np.linspace(-5, 5, side), values.reshape(side, side).T, [0.5], colors="k")
        ax.scatter(*x.T, c=y, cmap="RdBu_r", edgecolors="black", s=18, linewidths=0.6)
        ax.set_title(name, fontsize=9)
    page.colorbar(picture, ax=axes, shrink=0.8, label="p(second class)")
    path = options.results / f"paper_toy_{options.label}.png"
    page.savefig(path, dpi=110)
    return [path]


EXPERIMENT = Experiment(run, table, figure)
