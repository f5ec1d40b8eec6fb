# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The process of a contestant of :mod:`benchmarks.sampling`: the clock, and the two contestants of pyro_apd."""

from __future__ import annotations

import inspect
import os
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.sampling_peers import (
    BATCH_SIZE,
    THINNING,
    BlackJax,
    Contestant,
    Floor,
    HandWritten,
    Job,
    Posteriors,
    PyroPotential,
    TorchContestant,
    pyro_model,
    site_names,
)


class Stop(BaseException):
    """The parent needs no more blocks; not an ``Exception``, so that no driver catches it."""


class Clock:
    """Times blocks of steps, each at the parent's request.

    :param connection: to the parent.
    :param Callable synchronise: waits for the device.
    :ivar Callable bare: takes steps without a driver, if it has one.
    :ivar Callable facts: what the contestant reports about itself.
    """

    def __init__(self, connection: Connection, synchronise: Callable[[], None]) -> None:
        self._connection, self._synchronise = connection, synchronise
        self.bare: Callable[[int], None] | None = None
        self.facts: Callable[[], dict[str, Any]] = dict
        self._began: tuple[float, float] | None = None

    def next_block(self) -> int:
        """Reports the block that ended now, if one did, and waits for the next: its number of steps."""
        if self._began is not None:
            self._report()
        while True:
            request, *arguments = self._connection.recv()
            if request == "stop":
                raise Stop
            if request == "facts":
                self._connection.send(("facts", self.facts()))
                continue
            self._began = (time.perf_counter(), time.process_time())
            if request == "block":
                return int(arguments[0])
            assert request == "bare"
            assert self.bare is not None
            self.bare(*arguments)
            self._report()

    def _report(self) -> None:
        assert self._began is not None
        self._synchronise()
        now = (time.perf_counter(), time.process_time())
        self._connection.send(("time", now[0] - self._began[0], now[1] - self._began[1]))
        self._began = None


class Ours(TorchContestant):
    """(e) ``apd.SGLD`` through ``pyro.infer.MCMC`` without progress bar, timed draw by draw from the driver's hook."""

    unit = THINNING
    max_draws = 10**7

    def _kernel(self, thinning: int) -> Any:
        import pyro_apd as apd

        known = inspect.signature(apd.kernels.base.StochasticGradientKernel.__init__).parameters
        settings: dict[str, Any] = {"compile": self.job.compile} if "compile" in known else {}
        self.kernel = apd.SGLD(
            pyro_model(self.job),
            self.job.step_size,
            batch_size=BATCH_SIZE,
            thinning=thinning,
            temperature=self.job.temperature,
            seed=0,
            **settings,
        )
        return self.kernel

    def _driver(self, thinning: int, num_samples: int, hook: Callable[..., None] | None) -> Any:
        from pyro.infer import MCMC

        params = dict(zip(site_names(self.job), self.params, strict=True))
        return MCMC(
            self._kernel(thinning),
            num_samples=num_samples,
            warmup_steps=0,
            initial_params=params,
            disable_progbar=True,
            hook_fn=hook,
        )

    def one_step(self) -> np.ndarray:
        """See :class:`Contestant`."""
        driver = self._driver(1, 1, None)
        driver.run(self.x, self.y)
        draws = driver.get_samples(group_by_chain=True)
        return np.concatenate(
            [draws[name].reshape(self.num_chains, -1).cpu().numpy() for name in site_names(self.job)], 1
        )

    def run(self, clock: Clock) -> None:
        """See :class:`Contestant`. The clock is read in the hook: after each draw, within Pyro's own loop."""
        clock.bare, clock.facts = self.advance, self._facts
        left = clock.next_block() // self.unit

        def hook(*_: Any) -> None:
            nonlocal left
            left -= 1
            if left <= 0:
                left = clock.next_block() // self.unit

        self._driver(THINNING, self.max_draws, hook).run(self.x, self.y)
        raise RuntimeError(
            f"max_draws={self.max_draws} draws were not enough for this number of blocks; use fewer rounds."
        )

    def _chain(self) -> Any:
        return getattr(self.kernel, "chain", None) or getattr(self.kernel, "_chain", None)

    def advance(self, num_steps: int) -> None:
        """See :class:`Contestant`. Steps of the chain that was run, without the driver."""
        import torch

        chain = self._chain()
        with torch.no_grad():
            for _ in range(num_steps // self.unit):
                chain.advance(self.unit)

    def _facts(self) -> dict[str, Any]:
        """How the steps are taken: compiled, captured or traced."""
        path = getattr(self._chain(), "path", None) or getattr(getattr(self._chain(), "potential", None), "path", None)
        return {"path": path} if path else {}


class OursVectorised(Ours):
    """(f) The same kernel with ``chain_method="vectorized"``."""

    def __init__(self, job: Job, num_chains: int) -> None:
        super().__init__(job)
        self.num_chains = num_chains
        # The driver allocates memory for all draws.
        num_bytes = num_chains * sum(4 * p.numel() for p in self.params)
        self.max_draws = min(5_000, (8 if job.device == "cpu" else 32) * 2**30 // num_bytes)

    def _driver(self, thinning: int, num_samples: int, hook: Callable[..., None] | None) -> Any:
        from pyro_apd.chains.driver import MCMC

        chains = [p.expand(self.num_chains, *p.shape).clone() for p in self.params]
        return MCMC(
            self._kernel(thinning),
            num_samples=num_samples,
            warmup_steps=0,
            num_chains=self.num_chains,
            chain_method="vectorized",
            initial_params=dict(zip(site_names(self.job), chains, strict=True)),
            disable_progbar=True,
            hook_fn=hook,
        )


#: By name: how to create it, and what to install if it cannot be imported.
CONTESTANTS: dict[str, Callable[[Job], Contestant]] = {
    "a": HandWritten,
    "b": Posteriors,
    "c": BlackJax,
    "d": PyroPotential,
    "e": Ours,
    "floor": Floor,
}


def make(name: str, job: Job) -> Contestant:
    """A contestant by name; ``fC`` has C chains."""
    if name.startswith("f") and name[1:].isdigit():
        return OursVectorised(job, int(name[1:]))
    return CONTESTANTS[name](job)


def _set_up(job: Job, name: str) -> Callable[[], None]:
    """Limits the threads; returns what waits for the device. JAX took its limits from the environment.

    There are as many threads as cores, because XLA uses more threads than its limit. Contestants share the cores:
    only one runs at a time.
    """
    if job.device == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-job.num_threads :])
    if name == "c":
        return lambda: None
    import torch

    torch.set_num_threads(job.num_threads)
    if job.device == "cpu":
        return lambda: None
    if not torch.cuda.is_available():
        raise ImportError(f"device '{job.device}' needs a GPU that torch can use, but there is none")
    return torch.cuda.synchronize


def serve(connection: Connection, name: str, job: Job, check_step_size: float) -> None:
    """The body of a contestant's process.

    Sends ``("ready", unit, num_chains)``; answers ``("block", steps)`` and ``("bare", steps)`` by ``("time", wall
    seconds, CPU seconds)`` and ``("facts",)`` by ``("facts", dict)``; and after ``("stop",)`` sends ``("steps", without
    noise, with noise)``: the states after one step of ``check_step_size`` on data of equal rows, at temperatures 0
    and 1 (None for the floor). What cannot be imported is ``("missing", why)``; any other failure ``("error",
    traceback)``.
    """
    # Chains with so few steps from a fixed start warn that they are short.
    warnings.simplefilter("ignore", UserWarning)
    try:
        synchronise = _set_up(job, name)
        contestant = make(name, job)
        connection.send(("ready", contestant.unit, contestant.num_chains))
        try:
            contestant.run(Clock(connection, synchronise))
        except Stop:
            alike = replace(job, is_alike=True, step_size=check_step_size)
            is_floor = name == "floor"
            steps = [None if is_floor else make(name, replace(alike, temperature=t)).one_step() for t in (0.0, 1.0)]
            connection.send(("steps", *steps))
    except EOFError:
        return  # the parent is gone, or has given up
    except ImportError as error:
        connection.send(("missing", str(error)))
    except Exception:
        connection.send(("error", traceback.format_exc()))
