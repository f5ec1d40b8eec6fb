# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""All that a GPU should be asked, in under ten minutes: ``python -m benchmarks.gpu [--device cuda] [--quick]``.

* SGLD steps per second on 784-100-10 with batches of 100, for 1, 16 and 256 chains together: by the captured graph, by
  compiled programs, and by these replayed as CUDA graphs, beside a hand-written eager loop.
* Whether steps wait for the device: they run under ``torch.cuda.set_sync_debug_mode("error")``.
* Seconds to distil a chain, and to predict with 200 draws.

A part that fails is a row of the table with its error, and the others go on. On a CPU the same runs without what only a
GPU has; ``--quick`` runs a small network for a moment, and writes nothing.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import pyro_apd as apd
from benchmarks.common import markdown_table, write_json
from pyro_apd.kernels.engine.chain_set import ChainSet

SIZES, QUICK_SIZES = (784, 100, 10), (16, 8, 4)
CHAINS, QUICK_CHAINS = (1, 16, 256), (1, 3)
NUM_DATA, BATCH_SIZE, STEP_SIZE, AT_ONCE = 10_000, 100, 1e-6, 20
#: Settings of the kernel, by how steps are computed; the last on a GPU alone.
PATHS: dict[str, dict[str, Any]] = {
    "captured": {"compile": False},
    "compiled": {"compile": True},
    "CUDA graphs": {"compile": True, "cuda_graphs": True},
}

Data = tuple[Tensor, Tensor]


class Bench:
    """Networks, data and times on one device.

    :param device: where to compute.
    :param is_quick: on a small network, for a moment, and not compiled.
    """

    def __init__(self, device: torch.device, is_quick: bool = False) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        self.sizes = QUICK_SIZES if is_quick else SIZES
        self.chains = QUICK_CHAINS if is_quick else CHAINS
        self.seconds = 0.05 if is_quick else 3.0
        self.num_draws = 60 if is_quick else 500
        names = ["captured"] if is_quick else ["captured", "compiled"]
        self.paths = [*names, "CUDA graphs"] if self.is_cuda else names
        num_data = 200 if is_quick else NUM_DATA
        random = torch.Generator().manual_seed(0)
        x = torch.randn(num_data, self.sizes[0], generator=random)
        self.data: Data = (x.to(device), (torch.arange(num_data) % self.sizes[-1]).to(device))

    def network(self) -> nn.Sequential:
        """A perceptron of the benchmark's sizes."""
        layers = [part for pair in itertools.pairwise(self.sizes) for part in (nn.Linear(*pair), nn.ReLU())]
        return nn.Sequential(*layers[:-1]).to(self.device)

    def kernel(self, **settings: Any) -> apd.SGLD:
        """SGLD on it."""
        model = apd.BNN(self.network(), likelihood="categorical", prior_scale=0.4)
        return apd.SGLD(model, STEP_SIZE, batch_size=BATCH_SIZE, thinning=AT_ONCE, seed=0, **settings)

    def advancing(self, num_chains: int, path: str) -> Callable[[], None]:
        """A function that takes :data:`AT_ONCE` steps of all chains.

        :raises RuntimeError: if steps are not computed in that way.
        """
        count = None if num_chains == 1 else num_chains
        chain = self.kernel(**PATHS[path]).begin(self.data, {}, warmup_steps=0, chains=ChainSet(count=count))

        def advance() -> None:
            with torch.no_grad():
                chain.advance(AT_ONCE)

        advance()
        advance()
        if path != "captured" and chain.path != "compiled":
            raise RuntimeError(f"steps are {chain.path}, not compiled: see the log")
        return advance

    def eager(self) -> Callable[[], None]:
        """The same for a loop by hand, of one chain."""
        x, y = self.data
        parameters = [p.detach().clone().requires_grad_() for p in self.network().parameters()]
        scale = len(x) / BATCH_SIZE

        def advance() -> None:
            for _ in range(AT_ONCE):
                rows = torch.randint(len(x), (BATCH_SIZE,), device=self.device)
                hidden = x[rows]
                for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
                    hidden = functional.linear(
                        functional.relu(hidden) if weight is not parameters[0] else hidden, weight, bias
                    )
                loss = scale * functional.cross_entropy(hidden, y[rows], reduction="sum")
                prior = sum((p.square().sum() for p in parameters), torch.zeros((), device=self.device))
                gradients = torch.autograd.grad(loss + 0.5 / 0.4**2 * prior, parameters)
                with torch.no_grad():
                    for p, g in zip(parameters, gradients, strict=True):
                        p.add_(g, alpha=-0.5 * STEP_SIZE).add_(torch.randn_like(p), alpha=STEP_SIZE**0.5)

        advance()
        return advance

    def rate(self, advance: Callable[[], None]) -> float:
        """Steps per second of each chain."""
        self._wait()
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < self.seconds:
            advance()
            self._wait()
            count += AT_ONCE
        return count / (time.perf_counter() - began)

    def time_of(self, function: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds of a call, and its result."""
        self._wait()
        began = time.perf_counter()
        result = function()
        self._wait()
        return time.perf_counter() - began, result

    def _wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)


@contextmanager
def refusing_to_wait(is_cuda: bool) -> Iterator[None]:
    """Context in which an operation that waits for the GPU is an error; on a CPU nothing is changed."""
    if not is_cuda:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def attempted(results: list[dict[str, Any]], what: str, function: Callable[[], dict[str, Any]]) -> None:
    """Adds a row for what ``function`` measures, or for its error."""
    try:
        found = function()
    except Exception as error:  # whatever a device that was never tried comes up with
        lines = str(error).splitlines() or [""]
        found = {"error": f"{type(error).__name__}: {lines[0][:160]}"}
    results.append({"what": what, **found})
    print(f"{what}: {found}", flush=True)


def measure(bench: Bench) -> list[dict[str, Any]]:
    """All rows."""
    results: list[dict[str, Any]] = []
    attempted(results, "steps, eager loop, 1 chain", lambda: {"value": bench.rate(bench.eager()), "unit": "steps/s"})
    for num_chains in bench.chains:
        for path in bench.paths:
            name = f"steps, {path}, {num_chains} chain{'s' * (num_chains > 1)}"

            def steps(num_chains: int = num_chains, path: str = path) -> dict[str, Any]:
                advance = bench.advancing(num_chains, path)
                with refusing_to_wait(bench.is_cuda):
                    advance()
                rate = bench.rate(advance)
                return {"value": rate * num_chains, "unit": "chain-steps/s", "waits": False if bench.is_cuda else None}

            attempted(results, name, steps)
    attempted(results, f"distil and predict, {bench.num_draws} draws", lambda: whole(bench))
    return results


def whole(bench: Bench) -> dict[str, Any]:
    """Seconds of a run of the driver, of distilling it, and of predictions by the generator."""
    kernel = bench.kernel(compile=False)
    mcmc = apd.MCMC(kernel, bench.num_draws // 4, 10, num_chains=4, disable_progbar=True)
    sampled, _ = bench.time_of(lambda: mcmc.run(*bench.data))
    distilled, posterior = bench.time_of(lambda: apd.distill(mcmc, seed=0, progress=False, num_steps=50, strict=False))
    predictive = apd.Predictive(kernel.model, guide=posterior, num_samples=200, return_sites=("_RETURN",))
    predicted, _ = bench.time_of(lambda: predictive(bench.data[0][:1000]))
    return {"value": distilled, "unit": "s to distil", "sampled": sampled, "predicted": predicted}


def table(results: list[dict[str, Any]]) -> str:
    """In Markdown."""
    rows = []
    for result in results:
        remarks = []
        if "error" in result:
            remarks.append(result["error"])
        if result.get("waits") is False:
            remarks.append("waits for nothing")
        if "sampled" in result:
            remarks.append(f"{result['sampled']:.2f} s to sample, {result['predicted']:.2f} s to predict")
        value = f"{result['value']:.4g} {result['unit']}" if "value" in result else "failed"
        rows.append([result["what"], value, "; ".join(remarks)])
    return markdown_table(["what", "measured", ""], rows)


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and stores; 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    results = measure(Bench(device, options.quick))
    print(f"\n{name}, torch {torch.__version__}\n\n{table(results)}")
    if not options.quick:
        path = write_json(f"gpu_{device.type}", {"device": name, "torch": torch.__version__, "results": results})
        path.with_suffix(".md").write_text(f"{name}, torch {torch.__version__}\n\n{table(results)}\n")
        print(f"\nWritten to {path}")
    return int(any("error" in result for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
