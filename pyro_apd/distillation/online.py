# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Online distillation (Wang et al. 2018, Algorithm 2): chains and generator advance together; no chain is stored."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pyro import poutine
from torch import Tensor

from pyro_apd.chains.checkpoint import Checkpoint, Progress, note_checkpoint
from pyro_apd.chains.distributed import RankRun
from pyro_apd.chains.group import Plan, rebuilt_error
from pyro_apd.chains.identity import arguments_digest, check_identity, describe
from pyro_apd.chains.settings import Settings, checked_checkpoint, checked_initial_params
from pyro_apd.chains.stores.base import DrawStore
from pyro_apd.chains.stores.even import EvenStore
from pyro_apd.data.sources import shown_arguments
from pyro_apd.distillation.failure import DistillationWarning
from pyro_apd.distillation.function_space import function_space
from pyro_apd.distillation.offline import distill_draws, report
from pyro_apd.distillation.options import DistillOptions, RunLengths
from pyro_apd.distillation.source import MIN_DRAWS, Source
from pyro_apd.distillation.training import Training
from pyro_apd.kernels.engine.chain import Chain
from pyro_apd.kernels.engine.chain_set import ChainSet
from pyro_apd.models.layout import Layout
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.predictive.draws import all_finite
from pyro_apd.runtime import checks
from pyro_apd.runtime.global_state import gradients, new_params_removed, seeded, validation
from pyro_apd.runtime.ranks import Ranks, join_process_group
from pyro_apd.runtime.seeds import derived_seed, fresh_seed
from pyro_apd.runtime.threads import LongTask
from pyro_apd.runtime.trees import detached

if TYPE_CHECKING:
    from pyro_apd.kernels.base import StochasticGradientKernel

logger = logging.getLogger("pyro_apd")

# Key of the buffer among the chains of a checkpoint.
_BUFFER = -1
# A round before the last takes one in this many of the steps.
_SHARE_OF_STEPS = 4

#: Called after each round with the posterior so far and the number of draws per chain.
OnRound = Callable[[DistilledPosterior, int], None]


def distill_online(
    kernel: StochasticGradientKernel,
    *args: Any,
    num_samples: int = 1000,
    warmup_steps: int | None = None,
    num_chains: int = 4,
    buffer_size: int = 512,
    rounds: int = 3,
    num_steps: int | None = None,
    byte_budget: float | int | None = None,
    rank: int | None = None,
    storage_dtype: str | None = None,
    probe_inputs: Sequence[Any] | None = None,
    seed: int | None = None,
    restart: bool = False,
    on_round: OnRound | None = None,
    initial_params: Mapping[str, Tensor] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    chain_method: str = "vectorized",
    strict: bool = False,
    progress: bool = True,
) -> DistilledPosterior:
    """Samples and distils at once, in memory that does not depend on the length of the chains.

    Chains advance as one batched computation. A buffer keeps ``buffer_size`` of their draws, evenly spaced over all
    draws so far: when it is full, every second draw is removed. After a half, a quarter, ... of the draws, a generator
    is fitted to the buffer, as by :func:`~pyro_apd.distill`; the last round is at the end. ``metadata["rounds"]`` has
    the metrics of each round on held-out draws.

    With ``chain_method="distributed"`` every process of ``torchrun``, or of the present process group, makes the same
    call with all the data. Each runs its part of the chains and holds its part of the buffer. In a round all get the
    whole buffer and train one generator by averaged gradients, each with draws of its own and with its share of the
    probe inputs. All return the same posterior. Chains and buffer do not depend on the number of processes; the
    generator's random steps do. If a process is gone, the others raise a :class:`~pyro_apd.RankError`. Each process has
    its checkpoint, ``CHECKPOINT.rank0`` and so on, and the same call with as many processes, as under
    ``torchrun --max-restarts=1``, continues from the last checkpoint that all of them wrote.

    A generator that collapsed, diverged or is of an interrupted run is returned with a
    :class:`~pyro_apd.DistillationWarning`. Ctrl-C returns the generator of the last round or, before the first, the
    start of one.

    :param kernel: a kernel of this package; its ``seed`` makes the chains reproducible.
    :param args: the model's arguments, in one of the kernel's three styles.
    :param int num_samples: draws of each chain after warm-up.
    :param int warmup_steps: draws before them, which are never kept; by default half as many.
    :param int num_chains: chains, ``C``.
    :param int buffer_size: draws held at a time, of all chains together; at least 2 per chain.
    :param int rounds: how often a generator is trained, the last time included.
    :param int num_steps: generator steps of the last round, as in :func:`~pyro_apd.distill`; the others take a quarter.
    :param byte_budget: as in :func:`~pyro_apd.distill`; so are ``rank`` and ``storage_dtype``.
    :param tuple probe_inputs: as in :func:`~pyro_apd.distill`.
    :param int seed: of the training.
    :param bool restart: after each round but the last, put chains at fresh draws of the generator (the authors'
        "infinite chains"). It mixes the chains, but parts of the posterior that the generator lacks are lost to the
        chains as well, and they sample from the posterior again only after another warm-up: expect a bias, of which a
        warning reminds.
    :param callable on_round: called with the posterior so far and the number of draws; with several processes, in the
        first only. An error that it raises has the posterior as its attribute ``posterior``.
    :param dict initial_params: unconstrained values by site to start from, as for :class:`~pyro_apd.MCMC`.
    :param dict model_kwargs: keyword arguments of the model.
    :param checkpoint: a file. A run that finds its own checkpoint there continues from it, bit for bit; another run is
        refused.
    :param int checkpoint_every: draws between checkpoints, warm-up included; by default twenty a run.
    :param str chain_method: ``"vectorized"`` or ``"distributed"``.
    :param bool strict: raise instead of warn if the generator collapsed, diverged or was interrupted.
    :param bool progress: show progress bars.
    :raises TypeError: if the kernel is not one of this package.
    :raises ValueError: if a number is out of range.
    :raises DivergenceError: if all chains diverged.
    :raises CheckpointError: if no checkpoint can be read, it belongs to another run, or another run is writing it.
    :raises OSError: if a checkpoint cannot be written; the message says what is intact.
    :raises RankError: if another process is gone.
    :raises DistillationError: with ``strict=True``, where a warning would have been issued.
    """
    _check_kernel(kernel)
    lengths = RunLengths.checked(num_samples, warmup_steps, num_chains, buffer_size, rounds, checkpoint_every)
    checks.choice("chain_method", chain_method, ("vectorized", "distributed"))
    if restart:
        warnings.warn(
            "restart=True: chains continue from draws of the generator, so that its errors become draws. Metrics on "
            "the buffer cannot detect this; compare with a run without restart.",
            DistillationWarning,
            stacklevel=2,
        )
    options = DistillOptions(
        num_steps=num_steps, rank=rank, byte_budget=byte_budget, storage_dtype=storage_dtype, seed=seed
    )
    start = checked_initial_params(initial_params, lengths.num_chains)
    every = None if checkpoint is None else lengths.checkpoint_every
    plan = Plan(lengths.num_samples, lengths.warmup_steps, lengths.num_chains, start, None, every)
    path = checked_checkpoint(checkpoint, checkpoint_every)
    settings = Settings(plan, chain_method, checkpoint_path=path, disable_progbar=not progress, gather="all")
    ranks = join_process_group() if chain_method == "distributed" else Ranks()
    args = detached(args)

    # As in a run of the driver, since checks of distributions would be repeated in every step.
    task = LongTask(poutine.block, partial(validation, False))
    with gradients("distill_online"), task, new_params_removed(), ExitStack() as stack:
        distiller = _Rounds(kernel, args, dict(model_kwargs or {}), options, probe_inputs, on_round, progress, ranks)
        run = _OnlineRun(distiller, settings, stack, lengths.capacity, lengths.schedule, restart)
        try:
            run.sample()
            run.check_chains()
            posterior, training = distiller.make(run.whole_buffer(), lengths.num_samples, is_last=True)
        except KeyboardInterrupt:
            posterior, training = run.interrupted()
    report(posterior, training, strict)
    return posterior


@dataclass
class _Rounds:
    """Fits a new generator to the buffer in each round, since the principal coordinates change with the draws."""

    kernel: StochasticGradientKernel
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: DistillOptions
    probe_inputs: Sequence[Any] | None
    on_round: OnRound | None
    progress: bool
    ranks: Ranks
    log: list[dict[str, float]] = field(default_factory=list)
    last: tuple[DistilledPosterior, Training] | None = None

    def make(self, store: DrawStore, num_draws: int, *, is_last: bool = False) -> tuple[DistilledPosterior, Training]:
        """A posterior of the draws in the buffer. The caller reports failures, for the posterior that it returns only.

        :raises ValueError: if chains diverged, and too few draws are left.
        :raises KeyboardInterrupt: after a round that was interrupted, unless it is the last.
        """
        chains, num_kept = store.complete_part()
        if len(chains) * num_kept < MIN_DRAWS:
            raise ValueError(
                f"The buffer holds {num_kept} draws of chains {chains}, and at least {MIN_DRAWS} in all are needed: "
                "the other chains diverged. Sample with a smaller step size, or give a larger buffer_size."
            )
        options = self.options
        if not is_last:
            options = replace(options, share_of_steps=_SHARE_OF_STEPS)
        source = self._source(store.unconstrained(), store.layout)
        posterior, training = self.last = distill_draws(
            source, options, self.probe_inputs, self.progress and self.ranks.rank == 0, self.ranks
        )
        self.log.append({"draws": num_draws, **posterior.metadata["metrics"]})
        posterior.metadata |= {"online": True, "draws_seen": num_draws, "rounds": list(self.log)}
        logger.info("Distilled after %d draws per chain: %s.", num_draws, posterior.metadata["metrics"])
        if self.on_round is not None and self.ranks.rank == 0:
            try:
                self.on_round(posterior, num_draws)
            except Exception as error:
                setattr(error, "posterior", posterior)  # noqa: B010
                error.add_note(
                    f"`on_round` raised this after {num_draws} draws per chain. Their posterior is its attribute "
                    "`posterior`. With checkpoint=, the run can be continued."
                )
                raise
        if training.is_interrupted and not is_last:
            raise KeyboardInterrupt
        return posterior, training

    def check_probes(self, layout: Layout, theta: Tensor) -> None:
        """Checks before the first step, rather than in the first round, whether ``probe_inputs`` can be used.

        :raises ValueError: if they cannot.
        """
        if self.probe_inputs is not None:
            with seeded(0, theta.device):
                function_space(self._source(theta.reshape(-1, 1, layout.size), layout), self.probe_inputs)

    def _source(self, theta_CSD: Tensor, layout: Layout) -> Source:
        num_data = getattr(self.kernel, "num_data", None)
        args, kwargs, has_all = shown_arguments(self.args, self.kwargs, num_data)
        return Source(theta_CSD, layout, self.kernel.model, args, kwargs, has_all)


class _OnlineRun(RankRun):
    """Chains of the driver, with a buffer in place of a store, and with rounds of distillation.

    Processes are synchronised: they wait for each other before each checkpoint and in rounds.
    """

    def __init__(
        self, rounds: _Rounds, settings: Settings, stack: ExitStack, capacity: int, schedule: list[int], restart: bool
    ) -> None:
        super().__init__(rounds.kernel, settings, rounds.args, rounds.kwargs, stack, rounds.ranks)
        self._rounds = rounds
        self._capacity = capacity
        self._schedule = schedule
        self._restart = restart
        self.is_in_step = self.ranks.size > 1
        self._chain: Chain | None = None
        self._num_done = 0

    @property
    def buffer(self) -> EvenStore:
        """Draws of this process's chains."""
        assert isinstance(self.store, EvenStore)
        return self.store

    def whole_buffer(self) -> DrawStore:
        """Draws of the chains of all processes."""
        whole = self.gathered(self.buffer)
        assert whole is not None
        return whole

    def drew(self, chains: ChainSet, num_done: int, num_diverged: int) -> None:
        """Updates the progress bar, and distils if a round is due."""
        super().drew(chains, num_done, num_diverged)
        self._num_done = num_done
        num_kept = num_done - self.plan.warmup_steps
        if num_kept not in self._schedule:
            return
        buffer = self.whole_buffer()
        if not _has_enough(buffer):
            return
        posterior, _ = self._rounds.make(buffer, num_kept)
        if self._restart:
            self._put_chains_at(posterior, num_kept)

    def interrupted(self) -> tuple[DistilledPosterior, Training]:
        """The posterior of the last round, or the start of one, with the note that the run was interrupted.

        :raises KeyboardInterrupt: if there are no draws to make it from.
        """
        num_kept = max(self._num_done - self.plan.warmup_steps, 0)
        if self._rounds.last is None:
            if self.store is None or not _has_enough(self.store):
                error = KeyboardInterrupt()
                note_checkpoint(error, self.settings.checkpoint_path, "distill_online()")
                raise error
            # Other processes may not have been interrupted, hence of this process's draws alone.
            self._rounds.options = replace(self._rounds.options, num_steps=0)
            self._rounds.ranks = Ranks()
            self._rounds.make(self.buffer, num_kept)
        assert self._rounds.last is not None
        posterior, training = self._rounds.last
        what = (
            f"interrupted after {num_kept} of {self.plan.num_samples} draws per chain, with a posterior of the first "
            f"{posterior.metadata['draws_seen']}"
        )
        return posterior, replace(training, stopped=what)

    def check_chains(self) -> None:
        """Warns if chains diverged. Their draws from there on are not in the buffer.

        :raises DivergenceError: if all did.
        """
        noted = self.divergences()
        if not noted:
            return
        error = rebuilt_error(noted[0])
        if len(noted) == self.plan.num_chains:
            samples = self.whole_buffer().samples()
            error.draws = {name: value.flatten(0, 1) for name, value in samples.items()}
            raise error
        names = [note["chain"] for note in noted]
        warnings.warn(
            f"Chains {names} of {self.plan.num_chains} diverged and stopped. The first said: {error}", RuntimeWarning
        )

    def checkpoint(self, chains: ChainSet, progress: Progress) -> None:
        """Writes chains, buffer and what rounds there were."""
        self.meet_before_writing()
        self._notes["rounds"] = list(self._rounds.log)
        self._save({chains.first: progress, _BUFFER: Progress(state=self.buffer.state_dict())})

    def _kept(self) -> str:
        return "The draws since the last checkpoint are made again."

    def _open(self, chain: Chain, saved: Checkpoint | None) -> DrawStore:
        self._chain, self._device = chain, chain.theta.device
        given = self._rounds.options
        if given.seed is None:
            seed = self.ranks.broadcast_object(fresh_seed()) if saved is None else saved.notes["training_seed"]
            self._rounds.options = replace(given, seed=seed)
        self._rounds.check_probes(chain.layout, chain.theta)
        buffer = EvenStore(chain.layout, len(self.chains), self._capacity, chain.theta)
        self.store, self._saved = buffer, {}
        if self._path is None:
            return buffer
        # Chains depend on the training only where they are put at draws of the generator.
        trained = [describe(given), arguments_digest(self._rounds.probe_inputs)] if self._restart else None
        online = {"online": [self._capacity, self._schedule], "restart": trained}
        self._identity = {**self._describe(chain), **online}
        self._notes = {**self._circumstances(), "training_seed": self._rounds.options.seed}
        if saved is None:
            self._notes["run"] = self._name()
        if saved is not None:
            check_identity(self._path, saved.identity, self._identity)
            self._check_device(saved)
            buffer.load_state_dict(saved.chains[_BUFFER].state or {})
            self.progress = {first: saved.chains[first] for first in self.progress}
            self._notes, self._saved = dict(saved.notes), dict(saved.chains)
            self._rounds.log[:] = saved.notes.get("rounds", [])
            self._num_done = self.progress[self.own.start].num_done
        return buffer

    def _asked(self) -> dict[str, Any]:
        options = vars(self._rounds.options).items()
        training = {f"{name} of the training" if name == "seed" else name: value for name, value in options}
        buffer = {"buffer_size": self._capacity, "rounds": self._schedule, "restart": self._restart}
        return {**super()._asked(), **training, **buffer}

    def _put_chains_at(self, posterior: DistilledPosterior, draws: int) -> None:
        seed = None if self.kernel.seed is None else derived_seed(self.kernel.seed, "restart", draws)
        theta_CD = posterior.layout.unconstrain(posterior.get_samples(self.plan.num_chains, seed=seed))
        theta_CD = theta_CD[self.own.start : self.own.stop]
        assert self._chain is not None
        self._chain.theta = theta_CD.to(self._chain.theta).reshape(self._chain.theta.shape)


def _has_enough(store: DrawStore) -> bool:
    """Whether there are enough draws for a round, all finite: a chain may have diverged since the last check."""
    chains, num_draws = store.complete_part()
    return len(chains) * num_draws >= MIN_DRAWS and all_finite(store.unconstrained())


def _check_kernel(kernel: object) -> None:
    if inspect.isclass(kernel) or not callable(getattr(kernel, "begin", None)):
        what = kernel.__name__ if inspect.isclass(kernel) else type(kernel).__name__
        raise TypeError(
            f"`kernel` must be a kernel of this package, such as SGLD(model, ...); got {what}. Other kernels are "
            "distilled online by OnlineDistillation, as statistics of StreamingMCMC or as a hook."
        )
