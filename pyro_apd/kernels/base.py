# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What every stochastic-gradient MCMC kernel shares: its settings, Pyro's kernel contract, and the start of chains.

A sampler is a subclass with one method, :meth:`StochasticGradientKernel._update`: its update equation.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_apd.kernels.adaptation.dynamics import Dynamics
from pyro_apd.kernels.adaptation.step_size import MAX_INFLATION, AutoStep, checked_max_inflation
from pyro_apd.kernels.adaptation.warm_start import checked_warm_start
from pyro_apd.kernels.adaptation.warmup import WarmUp
from pyro_apd.kernels.engine.chain import Chain, Sampler
from pyro_apd.kernels.engine.chain_set import ChainSet
from pyro_apd.kernels.engine.control_variates import ControlVariates
from pyro_apd.kernels.engine.data_parallel import DataParallelGradient
from pyro_apd.kernels.engine.gradients import GradientEstimator, PlainGradient
from pyro_apd.kernels.engine.noise import checked_noise
from pyro_apd.kernels.engine.programs import Estimate
from pyro_apd.kernels.engine.progress import Progress
from pyro_apd.kernels.engine.schedules import Schedule, as_schedule
from pyro_apd.kernels.engine.starts import checked_start, checked_strategy, starting_at
from pyro_apd.kernels.engine.step import SMALL, Step, StepSettings, step_seconds, steps_per_program
from pyro_apd.kernels.engine.temperature import Temperature
from pyro_apd.kernels.shown import shown
from pyro_apd.models.building import build_potential, checked_model
from pyro_apd.models.layout import Layout
from pyro_apd.models.potential import Pieces, Potential
from pyro_apd.models.tracing import StartMessenger
from pyro_apd.runtime.checks import flag, integer, number
from pyro_apd.runtime.cpu_threads import threads_for
from pyro_apd.runtime.global_state import seeded
from pyro_apd.runtime.seeds import checked_seed, derived_seed, fresh_seed


class StochasticGradientKernel(MCMCKernel):
    """A kernel for :class:`pyro.infer.MCMC` and :class:`~pyro.infer.mcmc.api.StreamingMCMC` with mini-batch gradients.

    Mini-batches come in three styles; in each, U is that of the full data, with the prior counted once:

    (i) the model subsamples: ``pyro.plate("data", N, subsample_size=B)`` with ``pyro.subsample`` or the plate's
        indices; give the run the full data, and the kernel draws the indices;
    (ii) ``batch_size=B``: give the run the full tensors and write the model as for full-batch NUTS; every tensor
        argument with N rows is passed on B rows at a time. What is not a tensor, such as ``numpy.memmap`` or any object
        with a length that gives rows for an array of indices, is read batch by batch
        (see :mod:`pyro_apd.data.row_reader`);
    (iii) give the run one iterable of batches, such as a :class:`~torch.utils.data.DataLoader` (with ``num_data=N``
        where the iterable has no sized ``dataset``).

    :param model: a Pyro model with continuous latents. Weights must be drawn outside the data plate.
    :param step_size: epsilon: a positive number, a callable from the Langevin step (from 0, warm-up included) to it, or
        ``"auto"``: chosen during warm-up, from measured curvature and gradient noise, and then kept (see
        :mod:`pyro_apd.kernels.adaptation.step_size`). What was chosen and why is logged, and is
        ``diagnostics()["tuning"]``.
    :param float max_inflation: with ``step_size="auto"``, the share by which variances may come out too large.
    :param int warm_start: steps of Adam that optimise each chain before it warms up; None for none.
    :param int batch_size: rows per mini-batch, style (ii); None leaves mini-batches to the model or the arguments.
    :param int num_data: N, where it is not the leading dimension of the first tensor, or a loader does not show it; see
        :mod:`pyro_apd.data.epochs`.
    :param bool replacement: draw the rows of batches independently; by default they come in epochs, in which no row
        comes twice. For styles (i) and (ii): a loader has its own way of drawing.
    :param int prefetch: how far a thread reads ahead where batches come from a loader or from a file: so many batches,
        or of a small network so many times the steps (up to five) that are compiled into one program. They are sent to
        the chain's device meanwhile. Draws do not depend on it; 0 reads each batch when it is due.
    :param int thinning: Langevin steps per draw; ``num_samples`` and ``warmup_steps`` of the driver count draws.
    :param float temperature: T of the target exp(-U/T); 1 is the posterior.
    :param init_strategy: where chains start, as for Pyro's HMC; by default a draw from the prior.
    :param str noise: ``"normal"``; or ``"three-point"``, which is cheaper, for a thinning of 20 and more: steps keep
        their weak order (see :mod:`~pyro_apd.kernels.engine.noise`).
    :param int seed: makes the run reproducible without touching the global generator. Chains of one run differ. If
        None, the seed is taken from the global generator.
    :param bool control_variates: remove mini-batch noise near the state that sampling starts from, with two gradients
        per step (Baker et al. 2019; see :mod:`~pyro_apd.kernels.engine.control_variates`). It needs a start at a mode.
    :param compile: compile each step, which takes some 15 seconds at first. ``"auto"`` does so where the planned steps
        of a chain, or those taken, are so many that it saves more than its time by the estimate of
        :mod:`~pyro_apd.kernels.engine.programs`. It is announced, and ``diagnostics()["path"]`` says what was done.
    :param bool cuda_graphs: replay compiled steps on a GPU as a CUDA graph. Not measured yet, hence an option.
    :param bool capture: capture the potential as a graph of tensor operations (see :mod:`pyro_apd.models.potential`);
        otherwise the model is traced at every step.
    :raises ValueError: if a number is out of range.
    """

    model: Callable[..., Any] | None = None
    transforms: dict[str, Any] | None = None
    layout: Layout | None = None
    #: Why :func:`~pyro_apd.kernels.recommended.recommended_kernel` chose this kernel; empty where it did not.
    reason: str = ""
    __repr__ = shown

    def __init__(
        self,
        model: Callable[..., Any],
        step_size: float | str | Schedule,
        *,
        batch_size: int | None = None,
        num_data: int | None = None,
        replacement: bool = False,
        prefetch: int = 2,
        thinning: int = 1,
        temperature: float = 1.0,
        max_inflation: float = MAX_INFLATION,
        warm_start: int | None = None,
        init_strategy: Callable[..., Any] = init_to_sample,
        noise: str = "normal",
        seed: int | None = None,
        control_variates: bool = False,
        compile: bool | str = "auto",
        cuda_graphs: bool = False,
        capture: bool = True,
    ) -> None:
        self.model = checked_model(model)
        #: Step size by step; None where it is found during warm-up.
        self.schedule: Schedule | None = None if step_size == "auto" else as_schedule(step_size)
        self.max_inflation = checked_max_inflation(max_inflation)
        self.warm_start = checked_warm_start(warm_start)
        #: What ``step_size="auto"`` chose for the last chain, and why.
        self.tuning: dict[str, Any] = {}
        self.batch_size = None if batch_size is None else integer("batch_size", batch_size)
        self.num_data = None if num_data is None else integer("num_data", num_data)
        self.replacement = flag("replacement", replacement)
        self.prefetch = integer("prefetch", prefetch, at_least=0, hint="With 0, each batch is read when it is due.")
        self.thinning = integer("thinning", thinning)
        self.temperature = number("temperature", temperature, at_least=0, hint="1 is the posterior.")
        self.init_strategy = checked_strategy(init_strategy)
        self.noise = checked_noise(noise, self.thinning)
        self.seed = checked_seed(seed)
        self.control_variates = flag("control_variates", control_variates)
        self.compile = compile if compile == "auto" else flag("compile", compile, hint="Or 'auto'.")
        self.cuda_graphs = flag("cuda_graphs", cuda_graphs)
        self.capture = flag("capture", capture)
        self._initial_params: dict[str, Tensor] | None = None
        self._chain: Chain | None = None
        self._num_chains_begun = 0
        self._home = (os.getpid(), torch.initial_seed())
        self._last_params: dict[str, Tensor] | None = None
        self._warmup_steps = self._num_draws = 0
        self._progress = Progress()
        self._temperatures: list[Temperature] = []

    # -- Pyro's contract ----------------------------------------------------------------------------------------------

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Prepares a chain on the arguments of a run. The driver calls this.

        :raises ModelError: if the model's scaling cannot be established; the message says how to fix the model.
        :raises DataError: if a row of the data is outside the likelihood's support, or has NaN or infinite entries that
            the model does not mask.
        :raises ValueError: if ``batch_size`` does not fit the data, or ``initial_params`` does not fit the model.
        """
        self._warmup_steps, self._num_draws = warmup_steps, 0
        chain = self.begin(args, kwargs, warmup_steps=warmup_steps, initial_params=self._initial_params)
        self._initial_params = chain.layout.split(chain.theta)

    def begin(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        warmup_steps: int,
        num_samples: int | None = None,
        chains: ChainSet | None = None,
        initial_params: Mapping[str, Tensor] | None = None,
    ) -> Chain:
        """A chain, or several that advance together, ready to take steps.

        :param args: arguments of the run, and ``kwargs`` its keyword arguments.
        :param int warmup_steps: draws of warm-up.
        :param int num_samples: draws after it, where they are known.
        :param ChainSet chains: which chains of the run these are; None for a single one, numbered by the chains that
            this kernel began.
        :param initial_params: unconstrained values by site; for C chains with a leading dimension of C.
        :raises: as :meth:`setup`.
        """
        self._progress = Progress()
        run_seed = self._run_seed(is_numbered=chains is not None)
        if chains is None:
            chains = ChainSet(first=self._num_chains_begun)
        self._num_chains_begun += chains.size
        seeds = chains.seeds(run_seed)
        strategy = starting_at(self.init_strategy, initial_params, chains.count)
        potential, starts = self._open(args, kwargs, seeds, strategy)
        self.layout, self.transforms = potential.layout, potential.layout.transforms
        estimator = self._estimator(potential, chains)
        theta = starts[0] if chains.count is None else torch.stack(starts)
        if initial_params is not None:
            theta = checked_start(initial_params, potential.layout, theta)
        if chains.data_ranks is not None:
            chains.data_ranks.broadcast(theta)
        num_warmup = warmup_steps * self.thinning
        potential.source.prefetch = self.prefetch
        schedule, warmup = self._warm_up(num_warmup, potential.layout.size, chains, run_seed)
        num_draws = warmup_steps + (warmup_steps if num_samples is None else num_samples)
        unroll = steps_per_program(self.thinning) if potential.layout.size * chains.num_counted <= SMALL else 1
        settings = StepSettings(
            compile=self.compile if chains.data_ranks is None else False,
            expected_steps=num_draws * self.thinning,
            estimate=Estimate(len(potential.layout), potential.layout.size, chains.num_counted, unroll),
            cuda_graphs=self.cuda_graphs,
            unroll=unroll,
            noise=self.noise,
            num_threads=threads_for(step_seconds(potential, chains.size), theta.device),
        )
        sampler = Sampler(type(self).__name__, self._update, self._dynamics, self._kinetic, self._kept, self._restored)
        self._chain = Chain(potential, estimator, theta, chains, seeds, sampler, schedule, settings, warmup)
        self._start_chain(self._chain)
        return self._chain

    def _estimator(self, potential: Potential, chains: ChainSet) -> GradientEstimator:
        """How gradients are estimated.

        :raises ValueError: if settings do not go together.
        """
        if chains.data_ranks is not None:
            if self.control_variates:
                raise ValueError("control_variates=True and split='data' cannot be combined; leave one of them out.")
            return DataParallelGradient(potential, chains.data_ranks)
        return ControlVariates(potential) if self.control_variates else PlainGradient(potential)

    def end(self, chain: Chain) -> None:
        """Ends a chain of :meth:`begin`. Warns if its warm-up was too short.

        :raises DivergenceError: if it diverged in its last steps.
        """
        chain.check()
        self._temperatures = chain.temperatures(self.temperature)
        self.tuning = chain.warmup.report()
        chain.warmup.finish(chain)

    def report(self, chain: Chain) -> dict[str, Any]:
        """Report of a chain at its end, as JSON values; see :meth:`diagnostics`."""
        temperatures = [asdict(t) for t in chain.temperatures(self.temperature)]
        own = {"path": chain.path, "temperatures": temperatures, "excursions": chain.warmup.excursions.marked()}
        tuning = {"tuning": self.tuning} if self.tuning else {}
        return {**own, "warnings": list(chain.warmup.warnings), **tuning}

    def _open(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], seeds: list[int], strategy: Callable[..., Any]
    ) -> tuple[Potential, list[Tensor]]:
        """The potential, and where each chain starts by a ``strategy``."""
        assert self.model is not None
        starting = StartMessenger(strategy)(self.model)
        starts: list[Tensor] = []
        for seed in seeds:
            if not starts:
                potential, start = build_potential(
                    starting,
                    args,
                    kwargs,
                    batch_size=self.batch_size,
                    num_data=self.num_data,
                    replacement=self.replacement,
                    capture=self.capture,
                    seed=derived_seed(seed, "start"),
                )
            else:
                with seeded(derived_seed(seed, "start")):
                    start = potential.draw_start()
            starts.append(potential.layout.unconstrain(start).detach())
        # The strategy was for the starts. From here on every latent is given, and the plain model is used.
        potential.model = self.model
        return potential, starts

    @property
    def initial_params(self) -> dict[str, Tensor] | None:
        """Where the chain starts: unconstrained values by site. A value set before ``setup`` is the start."""
        return self._initial_params

    @initial_params.setter
    def initial_params(self, params: Mapping[str, Tensor] | None) -> None:
        self._initial_params = None if params is None else dict(params)

    def sample(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The next draw: ``thinning`` Langevin steps on from the unconstrained ``params``.

        :raises DivergenceError: if the chain diverged; its ``draws`` are those made before.
        """
        chain = self._running_chain()
        is_warm = self._num_draws >= self._warmup_steps
        if self._num_draws == self._warmup_steps:
            chain.end_warmup()
        self._num_draws += 1
        if len(chain.layout) == 0:
            return {}
        with torch.no_grad():
            if params is not self._last_params:
                chain.theta = chain.layout.join(params)
            try:
                chain.advance(self.thinning)
            except BaseException:  # Pyro's driver cleans up only after a run without an error
                chain.close()
                raise
            draw = chain.theta
            if is_warm:
                chain.keep(draw)
            self._last_params = chain.layout.split(draw)
        return self._last_params

    def logging(self) -> OrderedDict[str, str]:
        """What the progress bar shows: of several chains the mean, the number that diverged, and all steps per second.

        It is updated a few times per second only.
        """
        return self._progress.row(self._running_chain())

    def diagnostics(self) -> dict[str, Any]:
        """Of the finished chain: ``divergences`` (indices of draws; empty, as a chain that diverges raises),
        ``excursions`` (indices of draws outside of what the chain's history allows, see
        :mod:`pyro_apd.kernels.adaptation.excursions`) and, one entry per draw, ``potential`` (U on that draw's
        mini-batch), ``grad_norm`` and ``step_size``; ``path``, how steps were computed; ``temperatures``, see
        :meth:`temperatures`; ``warnings``, their texts; and ``tuning``, what ``step_size="auto"`` chose and why.

        :raises DivergenceError: if the chain diverged in its last steps.
        """
        chain = self._running_chain()
        self.end(chain)
        series = {name: torch.stack(v).cpu() if v else torch.empty(0) for name, v in chain.trace.items()}
        report = self.report(chain)
        own = {"excursions": [*report["excursions"], []][0], "temperatures": self.temperatures()}
        return {"divergences": [], **series, **report, **own}

    def temperatures(self) -> list[Temperature]:
        """Temperatures of the chain that ran last, over all weights and by site, each with its standard error.

        A chain at its target has the kernel's temperature; see :mod:`~pyro_apd.kernels.engine.temperature`.
        Empty where no chain has drawn yet.
        """
        return self._temperatures if self._chain is None else self._chain.temperatures(self.temperature)

    def cleanup(self) -> None:
        """Releases the data and the chain's buffers. Safe to call twice; ``layout`` and ``transforms`` stay."""
        if self._chain is not None:
            self._chain.close()
        self._initial_params = None
        self._chain = None
        self._last_params = None

    def __getstate__(self) -> dict[str, Any]:
        # Generators, graphs and open loaders do not pickle; setup makes new ones in the process that samples.
        return {**self.__dict__, "_chain": None, "_last_params": None}

    # -- what a sampler defines ---------------------------------------------------------------------------------------

    @abstractmethod
    def _update(self, step: Step) -> None:
        """Moves ``step.theta`` in place by one step. Tensor operations alone, since it may be compiled."""

    #: Of a sampler with momenta: sums of their thermal motion, n T by site, from the auxiliary state and step size.
    _kinetic: Callable[[Mapping[str, Pieces], float], Tensor] | None = None

    #: Auxiliary state that stays where a chain is put back to a checkpoint, and that which is put back; the rest is 0.
    _kept: tuple[str, ...] = ()
    _restored: tuple[str, ...] = ()

    def _warm_up(self, num_steps: int, num_latents: int, chains: ChainSet, run_seed: int) -> tuple[Schedule, WarmUp]:
        """Step size by step, and what adapts the chains over ``num_steps`` Langevin steps of warm-up."""
        seed = derived_seed(run_seed, "step size")
        auto = AutoStep(self.max_inflation, num_steps, seed) if self.schedule is None else None
        schedule = auto or self.schedule
        assert schedule is not None
        return schedule, WarmUp(num_steps, self.temperature, chains, auto, self.warm_start, num_latents)

    def _start_chain(self, chain: Chain) -> None:
        """Prepares what the sampler keeps beside theta, such as momenta, in ``chain.auxiliary``."""

    def _dynamics(self, chain: Chain) -> Dynamics:
        """The sampler's recursion at the chain's state, for ``step_size="auto"`` and the warning of a short warm-up."""
        return Dynamics()

    # -- internals ----------------------------------------------------------------------------------------------------

    def _running_chain(self) -> Chain:
        if self._chain is None:
            raise RuntimeError(f"{type(self).__name__}.setup(warmup_steps, *args) comes first; the driver calls it.")
        return self._chain

    def _run_seed(self, is_numbered: bool) -> int:
        """The seed that those of chains are derived from; in a worker process of Pyro's driver, one per worker.

        :param is_numbered: whether chains have numbers in their run, so that no other process has the same number.
        """
        if self.seed is None:
            return fresh_seed()
        if is_numbered or os.getpid() == self._home[0]:
            return self.seed
        # Pyro seeds the worker of chain i with the parent's initial seed plus i.
        return derived_seed(self.seed, "worker", (torch.initial_seed() - self._home[1]) % 2**31)
