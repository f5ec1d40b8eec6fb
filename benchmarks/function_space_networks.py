# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Networks that learn how noisy each input is: ``python -m benchmarks.function_space --part networks``.

8-20-2 on 200 rows of concrete and 8-16-16-2 on 500 rows, standardised by those rows: SiLU units, all weights and biases
N(0, 0.3^2), a mean and a scale softplus(.) + 1e-6 as outputs. ``sklearn-contrib-bde`` (MILE, Sommer et al., ICLR 2025)
has the same model with the prior and the units as options, so that it samples the same posterior. Compared are mean and
log scale at 50 rows that the networks have not seen.

Kernels run as a user would run them: on all rows, with ``step_size="auto"``, nothing set but a seed and the number of
steps; whether to compile they decide by themselves, with no compiled program on disk. What torch's compiler takes to
start counts for the first of them, MCLMC. Pyro's NUTS runs on U written by hand. Where the variable
PYRO_APD_BDE_PYTHON names a Python that has ``sklearn-contrib-bde``, that runs at the settings of its README and with
ten times the draws, and so does BlackJAX's NUTS, which it depends on; the latter, as it is the fastest, is then the
reference. Otherwise Pyro's is.

Effective draws: bulk ESS as in :mod:`pyro_apd.diagnostics.mixing.convergence`, the median over the 100 function values,
per CPU second of the whole run, with warm-up and compiling. They say nothing about bias: so read them with the ratio of
sds to the reference's.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from torch import Tensor
from torch.nn.functional import silu, softplus

import pyro_apd as apd
from benchmarks.common import RESULTS, markdown_table, write_json
from benchmarks.posteriordb_auto import KERNELS
from pyro_apd.diagnostics.mixing.convergence import statistics

DATA = Path(os.environ.get("PYRO_APD_DATA", "../shared/data"))
#: Names a Python that has ``sklearn-contrib-bde``.
PEERS = "PYRO_APD_BDE_PYTHON"
NUM_GRID, PRIOR_SD, SMALLEST_SCALE = 50, 0.3, 1e-6
NUM_CHAINS = 8
#: Steps of warm-up and kept steps of every kernel, and steps per draw.
LONG, SHORT, THINNING = (10_000, 100_000), (2_000, 10_000), 20
#: Chains, draws of warm-up and kept draws of Pyro's NUTS, and its largest tree; chains and draws of BlackJAX's.
PYRO_NUTS, NUTS_DEPTH, BLACKJAX_NUTS = (4, 100, 200), 8, (8, 600)
#: Goals for the means over function values: |error of the mean| in sds, and the range of sd ratios.
MAX_MEAN_ERROR, SD_RATIOS = 0.1, (0.95, 1.07)
HEADER = ["sampler", "draws", "CPU s", "effective draws", "per CPU s", "least", "r-hat", "mean off, sd (largest)"]
HEADER += ["sd ratio (range)", "largest \\|z\\|", "within", "said"]


@dataclass(frozen=True)
class Network:
    """A heteroscedastic network and its data.

    :ivar tuple sizes: units per layer, inputs and outputs included.
    :ivar Tensor x: inputs ``(N, F)``, and targets ``y`` ``(N,)``.
    :ivar Tensor grid: inputs ``(M, F)`` at which functions are compared.
    """

    name: str
    sizes: tuple[int, ...]
    x: Tensor
    y: Tensor
    grid: Tensor

    @property
    def num_weights(self) -> int:
        """D."""
        return sum((i + 1) * o for i, o in pairwise(self.sizes))

    def model(self, x: Tensor, y: Tensor) -> None:
        """The Pyro model, as for full-batch NUTS."""
        weights = {}
        for i, (num_in, num_out) in enumerate(pairwise(self.sizes)):
            zero = x.new_zeros(num_out, num_in)
            weights[f"weight.{i}"] = pyro.sample(f"weight.{i}", dist.Normal(zero, PRIOR_SD).to_event(2))
            weights[f"bias.{i}"] = pyro.sample(f"bias.{i}", dist.Normal(zero[:, 0], PRIOR_SD).to_event(1))
        mean, raw = forward(weights, x).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, softplus(raw) + SMALLEST_SCALE), obs=y)

    def potential(self, values: Mapping[str, Tensor]) -> Tensor:
        """U written by hand, up to a constant, of one value per site."""
        prior = sum((0.5 * (value / PRIOR_SD).square().sum() for value in values.values()), torch.zeros(()))
        mean, raw = forward(values, self.x).unbind(-1)
        scale = softplus(raw) + SMALLEST_SCALE
        return prior + (0.5 * ((self.y - mean) / scale).square() + scale.log()).sum()

    def functions(self, draws: Mapping[str, Tensor]) -> Tensor:
        """Mean and log scale over the grid, ``(..., 2 M)``, for draws ``(..., *shape)`` by site."""
        mean, raw = forward(draws, self.grid).unbind(-1)
        return torch.cat([mean, (softplus(raw) + SMALLEST_SCALE).log()], -1)


def forward(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Outputs ``(..., N, 2)`` of the network with weights ``(..., O, I)`` and biases ``(..., O)`` by layer."""
    num_layers = len(weights) // 2
    for i in range(num_layers):
        x = x @ weights[f"weight.{i}"].mT + weights[f"bias.{i}"].unsqueeze(-2)
        x = silu(x) if i < num_layers - 1 else x
    return x


def make_network(hidden: tuple[int, ...], num_rows: int, name: str = "concrete") -> Network:
    """A network on rows of a UCI table in random order; the rows after those are the grid."""
    loaded = np.loadtxt(DATA / "uci" / f"{name}.txt")
    table = torch.as_tensor(loaded[np.random.default_rng(0).permutation(len(loaded))])
    rows, others = table[:num_rows], table[num_rows : num_rows + NUM_GRID]
    mean, sd = rows.mean(0), rows.std(0)
    rows, others = ((part - mean) / torch.where(sd > 0, sd, 1.0) for part in (rows, others))
    sizes = (table.shape[1] - 1, *hidden, 2)
    x, y, grid = (part.float() for part in (rows[:, :-1], rows[:, -1], others[:, :-1]))
    return Network(f"{'-'.join(map(str, sizes))}, {num_rows} rows of {name}", sizes, x, y, grid)


#: By what they are called on the command line.
NETWORKS: dict[str, Callable[[], Network]] = {
    "one-layer": lambda: make_network((20,), 200),
    "two-layer": lambda: make_network((16, 16), 500),
}


@dataclass(frozen=True)
class Run:
    """What a sampler returned.

    :ivar dict draws: ``(C, S, ...)`` by site.
    :ivar dict said: more of the run, such as its warnings.
    """

    sampler: str
    draws: Mapping[str, Tensor]
    cpu_seconds: float
    said: Mapping[str, Any]


def cpu_seconds() -> float:
    """CPU seconds of this process, its threads and its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def pyro_nuts(network: Network, num_chains: int, num_warmup: int, num_draws: int) -> Run:
    """Pyro's NUTS from draws of the prior, on U written by hand and traced by torch's jit."""
    chains, begun = [], cpu_seconds()
    for seed in range(num_chains):
        pyro.set_rng_seed(seed)
        trace = poutine.trace(network.model).get_trace(network.x, network.y)
        start = {name: site["value"] for name, site in trace.iter_stochastic_nodes() if name != "data"}
        names = tuple(start)
        traced = torch.jit.trace(
            lambda *values, names=names: network.potential(dict(zip(names, values, strict=True))),
            tuple(start.values()),
            check_trace=False,
        )
        kernel = NUTS(
            potential_fn=lambda values, traced=traced, names=names: traced(*map(values.get, names)),
            max_tree_depth=NUTS_DEPTH,
        )
        mcmc = MCMC(kernel, num_draws, num_warmup, initial_params=start, disable_progbar=True)
        mcmc.run()
        chains.append(mcmc.get_samples())
        print(f"Pyro's NUTS, chain {seed}: {cpu_seconds() - begun:.0f} CPU s", file=sys.stderr, flush=True)
    draws = {name: torch.stack([chain[name] for chain in chains]) for name in chains[0]}
    return Run("NUTS of Pyro", draws, cpu_seconds() - begun, {})


def kernel(network: Network, name: str, steps: tuple[int, int], seed: int = 0) -> Run:
    """A kernel of this package as a user would run it, chains vectorised."""
    begun, (num_warmup, num_kept) = cpu_seconds(), steps
    sampler = KERNELS[name](network.model, "auto", thinning=THINNING, seed=seed)
    mcmc = apd.MCMC(sampler, num_kept // THINNING, num_warmup // THINNING, num_chains=NUM_CHAINS, disable_progbar=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mcmc.run(network.x, network.y)
    used, found = cpu_seconds() - begun, mcmc.diagnostics()
    first = f"chain {mcmc.chains[0]}"
    said = {"path": found["path"][first], "step_size": float(found["step_size"][first][-1])}
    said["warnings"] = [f"{type(w.message).__name__}: {w.message}" for w in caught]
    draws = mcmc.get_samples(group_by_chain=True)
    return Run(f"{name}, {sum(steps):,} steps", draws, used, said)


def peer(network: Network, which: str, python: str, **settings: int) -> Run:
    """A sampler of :mod:`benchmarks.function_space_peers` in a process of another Python."""
    names = {"bde": "BDE" + (", 10 x the draws" if "n_samples" in settings else ""), "nuts": "NUTS of BlackJAX"}
    arrays = {"x": network.x.numpy(), "y": network.y.numpy(), "hidden": np.array(network.sizes[1:-1])}
    numbers = {"prior_sd": PRIOR_SD, "seed": 0, **settings}
    script = Path(__file__).with_name("function_space_peers.py")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.npz"), Path(folder, "out.npz")
        np.savez(source, **arrays, **numbers)
        done = subprocess.run([python, script, which, source, target], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{names[which]} failed: {done.stderr[-2000:]}")
        with np.load(target) as file:
            found = dict(file)
    used = float(found.pop("cpu_seconds"))
    return Run(names[which], {name: torch.as_tensor(value) for name, value in found.items()}, used, {})


def runs(network: Network, python: str | None, is_quick: bool) -> Iterator[Run]:
    """All samplers; the first is the reference."""
    scale = 50 if is_quick else 1
    chains, draws = BLACKJAX_NUTS
    if python:
        yield peer(network, "nuts", python, num_chains=2 if is_quick else chains, num_draws=max(20, draws // scale))
    yield pyro_nuts(network, *((2, 5, 5) if is_quick else PYRO_NUTS))
    if python and not is_quick:
        yield peer(network, "bde", python)
        yield peer(network, "bde", python, n_samples=20_000)
    # The short run first: it is too short to be compiled, and would find the program of the long one.
    yield kernel(network, "MCLMC", (SHORT[0] // scale, SHORT[1] // scale))
    for name in reversed(KERNELS):
        yield kernel(network, name, (LONG[0] // scale, LONG[1] // scale))


def compared(run: Run, network: Network, reference: Tensor | None) -> dict[str, Any]:
    """The figures of a run, beside functions ``(C, S, F)`` of the reference."""
    functions = network.functions(run.draws)
    found = statistics(functions)
    row = {"sampler": run.sampler, "draws": list(functions.shape[:2]), "cpu_seconds": run.cpu_seconds, **run.said}
    row |= {"ess": float(found["ess_bulk"].median()), "smallest_ess": float(found["ess_bulk"].min())}
    row |= {"per_second": row["ess"] / run.cpu_seconds, "r_hat": float(found["rhat"].max())}
    if reference is None:
        return row
    gold, flat = (values.flatten(0, 1).double() for values in (reference, functions))
    sd = gold.std(0)
    off, ratio = ((flat.mean(0) - gold.mean(0)) / sd).abs(), flat.std(0) / sd
    row |= {"mean_error": float(off.mean()), "largest_mean_error": float(off.max())}
    row |= {"sd_ratio": float(ratio.mean()), "sd_range": [float(ratio.min()), float(ratio.max())]}
    row |= {"largest_z": float(((flat - gold.mean(0)) / sd).abs().max())}
    row["within"] = row["mean_error"] < MAX_MEAN_ERROR and SD_RATIOS[0] < row["sd_ratio"] < SD_RATIOS[1]
    return row


def cells(row: Mapping[str, Any]) -> list[str]:
    """A sampler's row of the table."""
    shown = [row["sampler"], " x ".join(f"{n:,}" for n in row["draws"]), f"{row['cpu_seconds']:.0f}"]
    shown += [f"{row['ess']:,.0f}", f"{row['per_second']:.1f}", f"{row['smallest_ess']:,.0f}", f"{row['r_hat']:.3f}"]
    if "mean_error" not in row:
        return [*shown, "reference", "", "", "", ""]
    low, high = row["sd_range"]
    shown += [f"{row['mean_error']:.3f} ({row['largest_mean_error']:.2f})"]
    shown += [f"{row['sd_ratio']:.3f} ({low:.2f} to {high:.2f})", f"{row['largest_z']:.1f}"]
    kinds = sorted({text.partition(":")[0] for text in row.get("warnings", [])})
    return [*shown, "yes" if row["within"] else "no", ", ".join(kinds) or "nothing"]


def main(which: str = "all", is_quick: bool = False) -> None:
    """Prints a table for each network, and writes the JSON."""
    if not (DATA / "uci").is_dir():
        print(f"Networks: skipped; {DATA / 'uci'} does not exist. Set PYRO_APD_DATA to the folder with the data.")
        return
    python = os.environ.get(PEERS)
    if not python:
        print(f"BDE and BlackJAX: skipped; {PEERS} does not name a Python that has sklearn-contrib-bde.")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    path = RESULTS / "function_space_networks.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in NETWORKS if which == "all" else [which]:
        network, rows, reference = NETWORKS[name](), [], None
        print(f"\n{network.name}, {network.num_weights} weights\n\n{markdown_table(HEADER, [])}", flush=True)
        for run in runs(network, python, is_quick):
            rows.append(compared(run, network, reference))
            reference = network.functions(run.draws) if reference is None else reference
            print("| " + " | ".join(cells(rows[-1])) + " |", flush=True)
            if not is_quick:
                write_json("function_space_networks", results | {name: {"network": network.name, "rows": rows}})
        results[name] = {"network": network.name, "rows": rows}
