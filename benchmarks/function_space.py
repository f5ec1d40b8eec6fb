# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""NUTS against the kernels, in function space: ``python -m benchmarks.function_space [--part ...] [--quick]``.

Part ``networks`` is :mod:`benchmarks.function_space_networks`. Part ``small``: two Bayesian networks small enough for
NUTS, with one hidden layer of tanh units, all weights N(0, 1) and each layer divided by the root of its fan-in: 1-16-1
regression on 50 points with a gap, noise sd 0.5, and 2-10-2 classification of 80 points on two arcs. Weights are not
compared, because hidden units can be permuted. Functions are, over a grid of inputs inside and outside the data.

Four chains of Pyro's NUTS are the reference. The resolution is the difference between each chain and the other three.
Step sizes and the pilot chain are those of :mod:`benchmarks.tuning`, and do not use the reference. Chains of every
sampler start from the prior.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from torch import Tensor

from benchmarks import function_space_networks
from benchmarks.common import markdown_table, write_json
from benchmarks.tuning import KERNELS, MCLMC_STEPS, SETTINGS, Pilot, TracedPotential, explore, plan, shown

CHAINS = 4
#: NUTS takes at most 2**TREE_DEPTH - 1 leapfrog steps per draw: this limits its time, not its correctness.
TREE_DEPTH = 6
NOISE = 0.5
#: By kernel and whether on mini-batches.
SAMPLERS = (("SGLD", False), ("SGLD", True), ("SGHMC", False), ("MCLMC", False))


def layer(name: str, x: Tensor, width: int) -> Tensor:
    """An affine layer ``(N, width)`` with standard normal weights, divided by the root of its fan-in."""
    weight = pyro.sample(f"{name}.weight", dist.Normal(x.new_zeros(width, x.shape[-1]), 1.0).to_event(2))
    bias = pyro.sample(f"{name}.bias", dist.Normal(x.new_zeros(width), 1.0).to_event(1))
    return affine(x, weight, bias)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``(..., N, width)`` from inputs ``(..., N, F)``, weights ``(..., width, F)`` and biases ``(..., width)``."""
    return x @ weight.mT / math.sqrt(weight.shape[-1]) + bias[..., None, :]


def regression(x: Tensor, y: Tensor) -> None:
    """1-16-1, with inputs doubled, so that functions are more curved."""
    mean = layer("last", torch.tanh(layer("first", 2.0 * x, 16)), 1)[:, 0]
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(mean, NOISE), obs=y)


def classification(x: Tensor, y: Tensor) -> None:
    """2-10-2, with inputs and logits doubled."""
    logits = 2.0 * layer("last", torch.tanh(layer("first", 2.0 * x, 10)), 2)
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Categorical(logits=logits), obs=y)


def outputs(draws: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Outputs of the last layer, ``(S, N, outputs)``, for draws ``(S, ...)`` by site."""
    hidden = torch.tanh(affine(2.0 * x, draws["first.weight"], draws["first.bias"]))
    return affine(hidden, draws["last.weight"], draws["last.bias"])


@dataclass(frozen=True)
class Problem:
    """A model with data and a grid.

    :ivar str name: its name in the table.
    :ivar model: the Pyro model.
    :ivar args: inputs and targets.
    :ivar Tensor grid: inputs ``(M, F)`` to compare at.
    :ivar Tensor is_inside: which of them lie within the range of the data, ``(M,)``.
    :ivar function: from draws and inputs to what is compared, ``(S, M)``.
    :ivar loss: from the last layer's outputs ``(N, outputs)`` and targets to -log p(targets | outputs), summed, up to a
        constant.
    :ivar int batch_size: rows per mini-batch.
    """

    name: str
    model: Callable[..., None]
    args: tuple[Tensor, Tensor]
    grid: Tensor
    is_inside: Tensor
    function: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    batch_size: int

    def potential(self, values: Mapping[str, Tensor]) -> Tensor:
        """U written by hand, up to a constant, of one value per site."""
        prior = sum((0.5 * value.square().sum() for value in values.values()), torch.zeros(()))
        return prior + self.loss(outputs(values, self.args[0]), self.args[1])


def make_regression() -> Problem:
    """Fifty points of a sine in two clusters; the grid covers them, the gap and both sides."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(50, 1, generator=generator) * 0.9 + 0.2
    x = torch.where(torch.arange(50)[:, None] < 25, -x, x)
    y = torch.sin(4 * x[:, 0]) + NOISE * torch.randn(50, generator=generator)
    grid = torch.linspace(-2, 2, 81)[:, None]
    inside = (grid[:, 0].abs() > 0.2) & (grid[:, 0].abs() < 1.1)

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((y - f[:, 0]) / NOISE).square().sum()

    return Problem("1-16-1 regression", regression, (x, y), grid, inside, lambda d, x: outputs(d, x)[..., 0], loss, 10)


def make_classification() -> Problem:
    """Eighty points on two interleaved arcs; the grid is twice as wide as they are."""
    generator = torch.Generator().manual_seed(0)
    angle, label = math.pi * torch.rand(80, generator=generator), torch.arange(80) % 2
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], -1)
    lower = torch.stack([0.5 - angle.cos(), 0.25 - angle.sin()], -1)
    x = torch.where(label[:, None] == 0, upper, lower) + 0.2 * torch.randn(80, 2, generator=generator)
    axis = torch.linspace(-3, 3, 21)
    grid = torch.cartesian_prod(axis, axis)
    inside = (grid[:, 0].abs() < 1.5) & (grid[:, 1].abs() < 1.25)

    def probability(draws: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return torch.softmax(2.0 * outputs(draws, x), -1)[..., 1]

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(2.0 * f, y, reduction="sum")

    return Problem("2-10-2 classification", classification, (x, label), grid, inside, probability, loss, 20)


def run(problem: Problem, kernel: Any, seed: int, num_draws: int, warmup: int, *args: Tensor, **settings: Any) -> Any:
    """One chain: its functions over the grid ``(S, M)``, seconds, and the kernel's diagnostics."""
    pyro.set_rng_seed(seed)
    mcmc = MCMC(kernel, num_draws, warmup, disable_progbar=True, **settings)
    begun = time.monotonic()
    mcmc.run(*args)
    return problem.function(mcmc.get_samples(), problem.grid), time.monotonic() - begun, mcmc.diagnostics()


def difference(one_SM: Tensor, other_SM: Tensor, is_inside: Tensor, is_probability: bool) -> dict[str, float]:
    """Differences between two samples of functions; means and sds in units of the other's sd at each input.

    For probabilities also the total variation of the averaged prediction (its mean and largest over the grid) and the
    share of inputs where the more probable class is the same.
    """
    sd = other_SM.std(0)
    mean, spread = (one_SM.mean(0) - other_SM.mean(0)) / sd, one_SM.std(0) / sd
    figures = {}
    for name, where in (("inside", is_inside), ("outside", ~is_inside)):
        figures[f"mean_{name}"] = float(mean[where].abs().mean())
        figures[f"mean_max_{name}"] = float(mean[where].abs().max())
        figures[f"sd_{name}"] = float(spread[where].mean())
        figures[f"sd_min_{name}"], figures[f"sd_max_{name}"] = float(spread[where].min()), float(spread[where].max())
    if is_probability:
        one, other = one_SM.mean(0), other_SM.mean(0)
        figures["tv"], figures["tv_max"] = float((one - other).abs().mean()), float((one - other).abs().max())
        figures["agreement"] = float(((one > 0.5) == (other > 0.5)).double().mean())
    return figures


def r_hat(chains_CSM: Tensor) -> float:
    """Largest split r-hat of the function over the grid."""
    return float(pyro.ops.stats.split_gelman_rubin(chains_CSM).max())


def nuts(problem: Problem, num_draws: int) -> dict[str, Any]:
    """The reference: its functions, seconds and divergences. U is written out by hand, and traced by torch's jit."""
    results = []
    for seed in range(CHAINS):
        pyro.set_rng_seed(seed)
        trace = poutine.trace(problem.model).get_trace(*problem.args)
        start = {name: site["value"] for name, site in trace.iter_stochastic_nodes() if "." in name}
        traced = torch.jit.trace(
            lambda *values, names=tuple(start): problem.potential(dict(zip(names, values, strict=True))),
            tuple(start.values()),
            check_trace=False,
        )
        kernel = NUTS(
            potential_fn=lambda values, traced=traced, names=tuple(start): traced(*map(values.get, names)),
            max_tree_depth=TREE_DEPTH,
        )
        results.append(run(problem, kernel, seed, num_draws, num_draws // 2, initial_params=start))
        print(f"NUTS, chain {seed}: {results[-1][1]:.0f} s", file=sys.stderr, flush=True)
    functions = torch.stack([functions for functions, _, _ in results])
    divergences = sum(len(chain) for _, _, d in results for chain in d["divergences"].values())
    return {"functions": functions, "seconds": [s for _, s, _ in results], "divergences": divergences}


def between_chains(chains_CSM: Tensor, problem: Problem) -> dict[str, float]:
    """Each chain against the others: of every figure the mean over chains."""
    is_probability = problem.model is classification
    rows = []
    for i in range(len(chains_CSM)):
        others = torch.cat([chain for j, chain in enumerate(chains_CSM) if j != i])
        rows.append(difference(chains_CSM[i], others, problem.is_inside, is_probability))
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def sampled(problem: Problem, name: str, is_batched: bool, pilot: Pilot, steps: int) -> dict[str, Any]:
    """Chains of one kernel; 1,000 draws per chain after a fifth of the steps as warm-up."""
    batch_size = problem.batch_size if is_batched else None
    how = plan(name, pilot, len(problem.args[0]), batch_size)
    thinning = max(1, steps // 1_000)
    if name == "MCLMC":
        thinning = min(thinning, MCLMC_STEPS)
    results = []
    for seed in range(CHAINS):
        kernel = KERNELS[name](
            problem.model,
            how.step_size,
            batch_size=batch_size,
            thinning=thinning,
            seed=seed,
            compile=True,
            **SETTINGS[name],
        )
        results.append(run(problem, kernel, seed, 1_000, 200, *problem.args))
    functions = torch.stack([functions for functions, _, _ in results])
    seconds = [s for _, s, _ in results]
    settings = {"kernel": name, "batch_size": batch_size, "step_size": how.step_size, "steps": 1_200 * thinning}
    return {**settings, "seconds": seconds, "functions": functions}


def cells(problem: str, row: Mapping[str, Any]) -> list[str]:
    """An entry's row of the table."""
    f = row["figures"]
    tv = f"{f['tv']:.4f} / {f['tv_max']:.3f}" if "tv" in f else ""
    agreement = f"{f['agreement']:.3f}" if "agreement" in f else ""
    return [
        problem,
        row["sampler"],
        shown(row["step_size"]) if "step_size" in row else "",
        f"{row['steps']:,}" if "steps" in row else "",
        f"{sum(row['seconds']):.0f}" if "seconds" in row else "",
        f"{row['r_hat']:.3f}" if "r_hat" in row else "",
        *(f"{f[f'mean_{where}']:.3f} / {f[f'mean_max_{where}']:.3f}" for where in ("inside", "outside")),
        *(
            f"{f[f'sd_{where}']:.3f} ({f[f'sd_min_{where}']:.2f} to {f[f'sd_max_{where}']:.2f})"
            for where in ("inside", "outside")
        ),
        tv,
        agreement,
    ]


HEADER = ["network", "sampler", "step size", "steps per chain", "seconds", "largest r-hat"]
HEADER += ["mean inside", "mean outside", "sd inside", "sd outside", "TV mean / max", "agreement"]


def one_problem(problem: Problem, num_draws: int, steps: int) -> dict[str, Any]:
    """All samplers on one problem; prints each row when it is ready."""
    gold = nuts(problem, num_draws)
    pooled = gold["functions"].flatten(0, 1)
    draws = f"{CHAINS} x {num_draws}"
    row = {"seconds": gold["seconds"], "r_hat": r_hat(gold["functions"]), "divergences": gold["divergences"]}
    rows = [{"sampler": f"NUTS ({draws}), a chain against the rest", **row}]
    rows[0]["figures"] = between_chains(gold["functions"], problem)
    print("| " + " | ".join(cells(problem.name, rows[0])) + " |", flush=True)
    pyro.set_rng_seed(0)
    target = TracedPotential(problem.model, problem.args, {})
    pilot = explore(target)
    for name, is_batched in SAMPLERS:
        row = sampled(problem, name, is_batched, pilot, steps)
        functions = row.pop("functions")
        row["sampler"] = name + (f", batches of {problem.batch_size}" if is_batched else ", full batch")
        row["r_hat"] = r_hat(functions)
        is_probability = problem.model is classification
        row["figures"] = difference(functions.flatten(0, 1), pooled, problem.is_inside, is_probability)
        row["between_chains"] = between_chains(functions, problem)
        rows.append(row)
        print("| " + " | ".join(cells(problem.name, row)) + " |", flush=True)
    return {"problem": problem.name, "rows": rows}


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", choices=["small", "networks", *function_space_networks.NETWORKS, "all"], default="all"
    )
    parser.add_argument("--quick", action="store_true", help="fewer draws and steps, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part in ("small", "all"):
        small(options.quick)
    if options.part != "small":
        part = "all" if options.part == "networks" else options.part
        function_space_networks.main(part, options.quick)


def small(is_quick: bool) -> None:
    """Prints the table of the small networks and writes its JSON."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        print(markdown_table(HEADER, []), flush=True)
        num_draws, steps = (60, 10_000) if is_quick else (300, 40_000)
        results = []
        for make in (make_regression, make_classification):
            results.append(one_problem(make(), num_draws, steps))
            if not is_quick:
                write_json("function_space", results)
    finally:
        torch.set_default_dtype(dtype)


if __name__ == "__main__":
    main()
