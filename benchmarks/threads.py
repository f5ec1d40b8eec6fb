# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""One posterior that several threads serve: ``python -m benchmarks.threads [--seconds 60] [--threads 8]``.

A 64-50-10 network (3,760 weights). Each thread asks in turn for what :data:`REQUESTS` names, on data of its own, and
does not pause. Every answer is compared with the one that a single thread gave before; of fresh draws, that none is
given twice. The table has answers per second of one thread and of all together, wrong answers, errors, and by how much
resident memory grew after the first tenth of the time.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn

import pyro_apd as apd
from benchmarks.common import markdown_table, write_json

REQUESTS = ("ensemble", "get_samples", "sample", "Predictive")
NUM_DRAWS, NUM_ROWS = 30, 50
# Answers may differ by rounding: libraries choose their routines by the alignment of memory, among others.
TOLERANCE = 1e-5


class Service:
    """Answers requests from one posterior, and knows the answers.

    :param int num_clients: clients, each with data of its own.
    """

    def __init__(self, num_clients: int, sizes: tuple[int, int, int] = (64, 50, 10)) -> None:
        random = torch.Generator().manual_seed(0)
        net = nn.Sequential(nn.Linear(*sizes[:2]), nn.ReLU(), nn.Linear(*sizes[1:]))
        bnn = apd.BNN(net)
        draws = {
            site: prior.mean + torch.randn(NUM_DRAWS, *prior.mean.shape, generator=random)
            for site, prior in bnn.priors.items()
        }
        self._posterior = apd.distill(draws, num_steps=2, seed=0, progress=False, strict=False)
        self._ensemble = self._posterior.ensemble(NUM_DRAWS, net=net, link="softmax", seed=0)
        stored = self._posterior.get_samples(NUM_DRAWS, seed=1)
        self._predictive = apd.Predictive(bnn, posterior_samples=stored, reduce="mean_probability")
        self._inputs = [torch.randn(NUM_ROWS, sizes[0], generator=random) for _ in range(num_clients)]
        self._fresh: set[float] = set()
        self._known = [{what: self._answer(what, client) for what in REQUESTS} for client in range(num_clients)]

    def is_right(self, what: str, client: int) -> bool:
        """Makes a request, and compares the answer."""
        found, known = self._answer(what, client), self._known[client][what]
        if what == "sample":
            # Fresh draws: none that was given before, to whomever.
            value = float(found)
            is_new = value not in self._fresh
            self._fresh.add(value)
            return is_new
        return torch.allclose(found, known, atol=TOLERANCE)

    def _answer(self, what: str, client: int) -> Tensor:
        x = self._inputs[client]
        if what == "ensemble":
            return self._ensemble(x).detach()  # type: ignore[no-any-return]
        if what == "get_samples":
            return _joined(self._posterior.get_samples(NUM_DRAWS, seed=client))
        if what == "sample":
            return _joined(self._posterior.sample((2,))).double().sum()
        return self._predictive(x)["mean_probability"]  # type: ignore[no-any-return]


def _joined(draws: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten(1) for value in draws.values()], -1)


def serve(service: Service, num_threads: int, is_over: Callable[[int], bool]) -> dict[str, Any]:
    """Requests of all threads until ``is_over(answers of this thread)``: counts of answers, wrong ones and errors."""
    answers: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    errors: list[str] = []
    counting = threading.Lock()

    def work(client: int) -> None:
        count = 0
        while not is_over(count):
            what = REQUESTS[(count + client) % len(REQUESTS)]
            try:
                is_right = service.is_right(what, client)
            except Exception as error:  # whatever it is, it is counted
                with counting:
                    errors.append(f"{what}: {type(error).__name__}: {error}"[:200])
                is_right = True
            count += 1
            with counting:
                answers[what] += 1
                wrong[what] += not is_right

    threads = [threading.Thread(target=work, args=(client,)) for client in range(num_threads)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "threads": num_threads,
        "seconds": time.monotonic() - began,
        "answers": dict(answers),
        "wrong": dict(wrong),
        "errors": errors,
        "handlers_left": am_i_wrapped(),
    }


def measured(service: Service, num_threads: int, seconds: float) -> dict[str, Any]:
    """:func:`serve` for so long, with the growth of memory after its first tenth, in MB."""
    end = time.monotonic() + seconds
    early: list[float] = []

    def is_over(_: int) -> bool:
        now = time.monotonic()
        if not early and now > end - 0.9 * seconds:
            early.append(_resident_mb())
        return now > end

    found = serve(service, num_threads, is_over)
    return {**found, "memory_mb": early[0], "growth_mb": _resident_mb() - early[0]}


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def table(results: list[dict[str, Any]]) -> str:
    """One row per number of threads."""
    rows = []
    for result in results:
        answers, seconds = result["answers"], result["seconds"]
        rows.append(
            [
                str(result["threads"]),
                f"{seconds:.0f}",
                *(f"{answers[what] / seconds:.0f}" for what in REQUESTS),
                f"{sum(answers.values()) / seconds:.0f}",
                str(sum(result["wrong"].values())),
                str(len(result["errors"])),
                f"{result['growth_mb']:+.1f} of {result['memory_mb']:.0f}",
            ]
        )
    header = ["threads", "s", *(f"{what} / s" for what in REQUESTS), "all / s", "wrong", "errors", "memory, MB"]
    return markdown_table(header, rows)


def main() -> None:
    """Measures, prints and stores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    service = Service(options.threads)
    results = [measured(service, count, options.seconds) for count in (1, options.threads)]
    print(table(results))
    for result in results:
        for error in result["errors"][:5]:
            print(error)
    write_json("threads", results)


if __name__ == "__main__":
    main()
