# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Active learning: 20 labels, then 10 in each of 49 rounds (the paper's section 4.4, protocol of Gal et al. 2017).

Networks are perceptrons, 64-50-10 on the digits and 784-100-10 on MNIST, where the paper has a convolutional network.

Faithful: the authors' cold likelihood (temperature 1/1000), a prior that narrows with the labels (precision 0.05 n),
step size 0.05 / n on full batches from PyTorch's initialisation, 3,000 steps with 500 of burn-in, the first two of each
class as the start, maximal entropy, and their generator with 1,000 updates per round, beside ours. Corrected:
temperature 1, one prior, chains that start there, a random balanced start, and our generator. In both, the generator is
trained and MC-dropout drops units, neither of which the published code did; MC-dropout has the published weight decay
and start; and random choice is the control.

Smaller budgets do less. ``cpu``: faithful chains have a third of the steps, each three times as long; generators are
trained for few steps per round (ours 10 from its Gaussian start, the paper's 50, in one run); MNIST is a pool of 5,000,
2,000 test images and 10 rounds. On MNIST the step size of corrected chains is smaller, and they have correspondingly
more steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor

import pyro_apd as apd
from benchmarks import distillation_cases
from benchmarks.common import markdown_table
from benchmarks.distillation_cases import network
from benchmarks.paper.common import Job, Options, Results, data_root, plus_minus, warnings_noted
from benchmarks.paper.registry import Experiment
from pyro_apd import BNN, active_learning, datasets
from pyro_apd.active_learning import Baseline, Chain, Distilled, balanced
from pyro_apd.runtime.global_state import seeded

CONTROL = "SGLD, random"
PAPER = "APD, paper's generator, entropy"


@dataclass(frozen=True)
class Pool:
    """Data of one run, and the network for them."""

    sizes: tuple[int, ...]
    prior_scale: float
    x_pool: Tensor
    y_pool: Tensor
    x_test: Tensor
    y_test: Tensor

    def model(self, seed: int) -> BNN:
        """The network as PyTorch initialises it with this seed."""
        with seeded(seed):
            net = network(*self.sizes)
        return BNN(net, likelihood="categorical", prior_scale=self.prior_scale).to(self.x_pool.device)


@dataclass(frozen=True)
class AsPublished:
    """The authors' posterior: a prior that narrows with the labels, PyTorch's start, a cold temperature.

    :ivar tuple sizes: of the network.
    :ivar int num_steps: full-batch Langevin steps, of which a sixth is burn-in.
    :ivar int thinning: steps per draw.
    :ivar float rate: the learning rate on the mean loss; the step size is this over the number of labels.
    :ivar generator_steps: updates of the generator; None for the chain itself.
    :ivar generator: the paper's, or None for ours.
    """

    sizes: tuple[int, ...]
    num_steps: int
    thinning: int
    rate: float
    generator_steps: int | None = None
    generator: str | None = None

    def __call__(self, model: BNN, x: Tensor, y: Tensor, seed: int, previous: Any) -> Any:
        """Draws by site, or the distilled posterior; the given model has the same sites, and only predicts."""
        narrow = narrowed(self.sizes, x, seed)
        num_draws, warmup = self.num_steps // self.thinning, self.num_steps // self.thinning // 6
        chain = Chain(
            lambda n: self.rate / n,
            num_samples=num_draws - warmup,
            warmup_steps=warmup,
            thinning=self.thinning,
            temperature=1e-3,
            options={"compile": False, "init_strategy": narrow.init_to_network},
        )
        if self.generator_steps is None:
            return chain(narrow, x, y, seed)
        options = {} if self.generator is None else {"generator": self.generator}
        return Distilled(chain, self.generator_steps, options=options)(narrow, x, y, seed)


@dataclass(frozen=True)
class Dropout:
    """MC-dropout as published: weight decay of 0.05 and PyTorch's start, in both protocols.

    While there are few labels, the mode under a chain's constant prior is close to zero weights, although its posterior
    is not. A learning rate that is stable on the digits is not stable on images of twelve times as many pixels. With
    either, this baseline is no better than guessing at 20 labels of MNIST.

    :ivar tuple sizes: of the network.
    :ivar dict options: of the descent.
    """

    sizes: tuple[int, ...]
    options: Mapping[str, Any]

    def __call__(self, model: BNN, x: Tensor, y: Tensor, seed: int, previous: Any) -> Any:
        """The network that drops units; the given model only predicts."""
        narrow = narrowed(self.sizes, x, seed)
        start = {"init_strategy": narrow.init_to_network}
        rate = 0.05 * shorter_steps(self.sizes[0])
        options = {**self.options, **start, "learning_rate": rate}
        return Baseline(apd.baselines.mc_dropout, options)(narrow, x, y, seed)


def narrowed(sizes: tuple[int, ...], x: Tensor, seed: int) -> BNN:
    """The network under the prior that narrows with the labels: weight decay of 0.05 on the mean loss."""
    with seeded(seed):
        net = network(*sizes)
    return BNN(net, likelihood="categorical", prior_scale=(0.05 * len(x)) ** -0.5).to(x.device)


def digits_pool(options: Options, seed: int) -> Pool:
    """All training digits, 64-50-10."""
    data = datasets.digits(seed=seed).to(options.device)
    count = options.by_budget(200, None, None)
    return Pool((64, 50, 10), 0.4, data.x_train[:count], data.y_train[:count], data.x_test[:count], data.y_test[:count])


def mnist_pool(options: Options, seed: int) -> Pool:
    """MNIST: a subset with the smaller budget, the same for every seed."""
    data = datasets.mnist(data_root()).to(options.device)
    pool, test = options.by_budget(200, 5000, 60_000), options.by_budget(200, 2000, 10_000)
    return Pool(
        (784, 100, 10), 0.02**0.5, data.x_train[:pool], data.y_train[:pool], data.x_test[:test], data.y_test[:test]
    )


def methods(options: Options, pool: Pool) -> dict[str, tuple[str, Any]]:
    """Acquisition and posterior by name."""
    descent = {"num_steps": options.by_budget(20, 1000, 3000), "momentum": 0.9, "decay": True, "batch_size": 50}
    dropout = Dropout(pool.sizes, descent)
    if options.is_faithful:
        # Of 3,000 steps 500 are burn-in, and every fifth of the others is kept.
        chain = AsPublished(pool.sizes, *options.by_budget((60, 5, 0.05), (1000, 10, 0.15), (3000, 5, 0.05)))
        steps, few = options.by_budget(2, 50, 1000), options.by_budget(2, 10, 300)
        return {
            CONTROL: ("random", chain),
            "SGLD, entropy": ("max_entropy", chain),
            "APD, entropy": ("max_entropy", replace(chain, generator_steps=few)),
            "MC-dropout, entropy": ("max_entropy", dropout),
            PAPER: ("max_entropy", replace(chain, generator_steps=steps, generator="paper")),
        }
    chain = Chain(
        partial(step_size, pool.sizes[0]),
        num_samples=options.by_budget(15, 25, 25),
        warmup_steps=options.by_budget(2, 25, 150),
        thinning=round(options.by_budget(2, 8, 40) / shorter_steps(pool.sizes[0])),
        num_chains=2,
        batch_size=50,
        options={"compile": False},
    )
    distilled = Distilled(chain, options.by_budget(2, 10, 300))
    if options.budget == "cpu" and pool.sizes[0] > 64:
        # With so many weights near their prior, fifty draws and ten steps give too wide a generator. The same chain,
        # thinned less, has more draws.
        distilled = Distilled(denser(chain, 4), 100)
    found = {
        CONTROL: ("random", chain),
        "SGLD, entropy": ("max_entropy", chain),
        "SGLD, BALD": ("bald", chain),
        "APD, entropy": ("max_entropy", distilled),
        "MC-dropout, entropy": ("max_entropy", dropout),
    }
    if options.budget == "full":
        found["MC-dropout, random"] = ("random", dropout)
        found["SGLD, BatchBALD"] = ("batch_bald", chain)
    return found


def denser(chain: Chain, times: int) -> Chain:
    """A chain of as many steps with ``times`` as many draws."""
    draws = {"num_samples": chain.num_samples * times, "warmup_steps": chain.warmup_steps * times}
    return replace(chain, thinning=chain.thinning // times, **draws)


def step_size(num_inputs: int, num_labels: int) -> float:
    """Stable for perceptrons with inputs in [-1, 1]: curvature grows with the number of labels and of inputs."""
    return min(3e-3, 0.22 / num_labels) * shorter_steps(num_inputs)


def shorter_steps(num_inputs: int) -> float:
    """Factor by which a step size for the digits is reduced."""
    return min(1.0, 64 / num_inputs)


def run(options: Options, results: Results) -> None:
    """One job for each data set, seed and method, seed by seed."""
    results.run(jobs(options))


def jobs(options: Options) -> list[Job]:
    """Always on the digits, on MNIST if there are data."""
    found: list[Job] = []
    for seed in options.seeds_or([0], range(5), range(5)):
        found += _jobs_of("digits", partial(digits_pool, options, seed), options, seed, options.by_budget(2, 50, 50))
    if options.has_images:
        for seed in options.seeds_or([0], range(5), range(5)):
            rounds = options.by_budget(2, 10, 50)
            found += _jobs_of("MNIST", partial(mnist_pool, options, seed), options, seed, rounds)
    return found


def _jobs_of(data: str, build: Callable[[], Pool], options: Options, seed: int, num_rounds: int) -> list[Job]:
    names = list(methods(options, Pool((64, 50, 10), 1.0, *[torch.zeros(1)] * 4)))
    if options.budget == "cpu":
        # A quarter of an hour per run, and so few steps train nothing: one run shows it.
        names = [name for name in names if name != PAPER or (data == "digits" and seed == 0)]
    return [(f"{data}/{name}/{seed}", partial(one_run, data, name, build, options, seed, num_rounds)) for name in names]


def one_run(
    data: str, name: str, build: Callable[[], Pool], options: Options, seed: int, num_rounds: int
) -> Mapping[str, Any]:
    """The history of one run; the rounds of an interrupted one are kept in the cache."""
    pool = build()
    acquisition, posterior = methods(options, pool)[name]
    initial = balanced(pool.y_pool, 20, seed=None if options.is_faithful else seed)
    slug = "".join(c if c.isalnum() else "_" for c in f"{data} {name} {seed}".lower())
    path = distillation_cases.CACHE / "paper" / f"active_learning-{options.protocol}-{options.budget}" / f"{slug}.json"
    if options.again:
        path.unlink(missing_ok=True)
    with warnings_noted() as notes:
        history = active_learning.run(
            pool.model(seed), pool.x_pool, pool.y_pool, pool.x_test, pool.y_test,
            posterior=posterior, acquisition=acquisition, initial=initial, num_rounds=num_rounds,
            pool_subset=options.by_budget(None, None, 10_000), seed=seed, history_path=path,
        )  # fmt: skip
    return {
        "mean_accuracy": history.mean_accuracy,
        "last_accuracy": history.accuracy[-1],
        "last_nll": history.rounds[-1].negative_log_likelihood,
        "num_labels": history.num_labels,
        "accuracy": history.accuracy,
        "nll": [one.negative_log_likelihood for one in history.rounds],
        "notes": sorted({note.split(":")[0] for note in notes}),
    }


def by_method(results: Results, data: str) -> dict[str, list[dict[str, Any]]]:
    """Runs by method, in the order of the list, each seed once."""
    found: dict[str, list[dict[str, Any]]] = {}
    for key, figures in results.under(data).items():
        name, seed = key.rsplit("/", 1)
        found.setdefault(name, []).append({**figures, "seed": int(seed)})
    return found


def table(options: Options, results: Results) -> str:
    """Accuracy by labels, the mean over rounds with a 95 % interval, and the difference from random choice."""
    lines = [f"### Active learning, {options.protocol} protocol, budget {options.budget}"]
    for data in ("digits", "MNIST"):
        runs = by_method(results, data)
        if not runs:
            continue
        labels = next(iter(runs.values()))[0]["num_labels"]
        shown = sorted({labels[0], *(labels[len(labels) * i // 5] for i in (1, 2, 3)), labels[-1]})
        header = [data, *(f"{n} labels" for n in shown), "mean over rounds", "less random", "labels to 0.9", "runs"]
        rows = [_row(name, runs, shown) for name in runs]
        lines += ["", markdown_table(header, rows)]
    lines += [
        "",
        "Test accuracy, mean ± sd over seeds. *Mean over rounds* and *less random* (the difference from the control, "
        "paired by seed) with 95 % intervals by Student's t over seeds. The posterior that chooses is the one that "
        "predicts. *Labels to 0.9*: median over seeds of the fewest labels with that accuracy.",
    ]
    return "\n".join(lines)


def _row(name: str, runs: Mapping[str, list[dict[str, Any]]], shown: Sequence[int]) -> list[str]:
    mine = runs[name]
    cells = []
    for count in shown:
        cells.append(plus_minus([one["accuracy"][one["num_labels"].index(count)] for one in mine], ".3f"))
    control = {one["seed"]: one["mean_accuracy"] for one in runs.get(CONTROL, [])}
    paired = [one["mean_accuracy"] - control[one["seed"]] for one in mine if one["seed"] in control]
    difference = "" if name == CONTROL or not paired else interval(paired)
    reached = sorted(_labels_to(one, 0.9) for one in mine)
    median = reached[len(reached) // 2]
    return [
        name, *cells, interval([one["mean_accuracy"] for one in mine]), difference,
        "never" if math.isinf(median) else f"{median:.0f}", str(len(mine)),
    ]  # fmt: skip


def _labels_to(figures: Mapping[str, Any], accuracy: float) -> float:
    pairs = zip(figures["num_labels"], figures["accuracy"], strict=True)
    return next((count for count, value in pairs if value >= accuracy), math.inf)


def interval(values: Sequence[float], level: float = 0.95) -> str:
    """``mean [low, high]`` by Student's t; only the mean of one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = float(student.ppf((1 + level) / 2, len(values) - 1)) * math.sqrt(variance / len(values))
    return f"{mean:.4f} [{mean - half:.4f}, {mean + half:.4f}]"


def figure(options: Options, results: Results) -> list[Path]:
    """Learning curves: means over seeds, and bands from minimum to maximum."""
    from matplotlib.figure import Figure

    shown = [data for data in ("digits", "MNIST") if by_method(results, data)]
    picture = Figure(figsize=(6.5 * len(shown), 4.5), layout="constrained")
    for ax, data in zip(picture.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for name, runs in by_method(results, data).items():
            curves_RN = torch.tensor([one["accuracy"] for one in runs])
            style = "--" if name == CONTROL else "-"
            (line,) = ax.plot(runs[0]["num_labels"], curves_RN.mean(0), style, label=f"{name} ({len(runs)} runs)")
            low, high = curves_RN.amin(0), curves_RN.amax(0)
            ax.fill_between(runs[0]["num_labels"], low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        ax.set(title=f"{data}, {options.protocol}", xlabel="labels", ylabel="test accuracy")
        ax.grid(alpha=0.3)
        ax.legend(loc="lower right", fontsize=8)
    path = options.results / f"paper_active_learning_{options.label}.png"
    picture.savefig(path, dpi=110)
    return [path]


EXPERIMENT = Experiment(run, table, figure)
