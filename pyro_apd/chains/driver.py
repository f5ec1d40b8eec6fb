# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Pyro's ``MCMC`` driver with vectorised chains, draws kept once, on disk where asked, and checkpoints."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import pyro
import pyro.infer
import torch
from pyro import poutine
from pyro.infer.mcmc.api import AbstractMCMC, StreamingMCMC
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.infer.mcmc.util import diagnostics as diagnostics_by_site
from torch import Tensor
from torch.distributions import Transform

from pyro_apd.chains.checkpoint import note_checkpoint
from pyro_apd.chains.distributed import RankRun
from pyro_apd.chains.group import Hook, Plan, rebuilt_error
from pyro_apd.chains.run import Run
from pyro_apd.chains.settings import (
    Settings,
    check_kinds,
    check_method,
    checked_checkpoint,
    checked_initial_params,
    checked_store,
    checkpoint_interval,
    refuse_files,
)
from pyro_apd.chains.shown import print_summary, shown
from pyro_apd.chains.stores.base import DrawStore, MemoryStore
from pyro_apd.chains.stores.disk import open_store
from pyro_apd.errors import DivergenceError
from pyro_apd.runtime.checks import flag, integer
from pyro_apd.runtime.global_state import gradients, new_params_removed, validation
from pyro_apd.runtime.ranks import join_process_group
from pyro_apd.runtime.threads import LongTask, one_thread
from pyro_apd.runtime.trees import detached

__all__ = ["MCMC", "open_store"]


class MCMC(pyro.infer.MCMC):
    """:class:`pyro.infer.MCMC` for this package's kernels: chains vectorised, draws kept once, runs that resume.

    Draws are written into one buffer of their final size, of which :meth:`get_samples` gives views. Everything else is
    Pyro's: ``get_samples``, ``diagnostics``, ``summary``. Kernels of others, such as NUTS, run as in Pyro.

    A chain that diverges stops, and the others continue. What it would have drawn from there on is left out, here and
    wherever the run is read: ``get_samples()`` has fewer chains, those that are not in :attr:`missing_chains`. A
    warning names it at the end, :attr:`diverged` holds the errors, and ``diagnostics()["divergences"]`` lists the
    draws that are missing. If all diverge, :class:`~pyro_apd.errors.DivergenceError` is raised, with the draws from
    before in its ``draws``. After that error, or any other, ``get_samples()`` gives the draws made so far. Ctrl-C
    stops the run, warns, and keeps the draws so far; KeyboardInterrupt is raised only if there are none. Of chains of
    unequal length the largest block that can be grouped is given, and :attr:`store` has the rest.

    :param kernel: a kernel.
    :param int num_samples: draws kept of each chain.
    :param int warmup_steps: draws before them, which are not kept; default as many.
    :param dict initial_params: unconstrained values by site to start from; with several chains, ``(C, ...)``.
    :param int num_chains: chains, ``C``.
    :param hook_fn: ``hook_fn(kernel, params, stage, i)`` after every draw, with unconstrained params. Vectorised chains
        are one call with params ``(C, ...)``. It must not wait for another thread that runs a model. With
        ``"parallel"`` it runs in the worker processes, as in Pyro.
    :param str mp_context: how ``"parallel"`` starts processes, ``"fork"`` or ``"spawn"``; default torch's, and
        ``"spawn"`` where data are on a GPU.
    :param bool disable_progbar: no progress bar.
    :param bool disable_validation: as Pyro's.
    :param dict transforms: to unconstrained space by site, in place of those of the supports, as Pyro's.
    :param save_params: sites to keep; default all.
    :param str chain_method: ``"vectorized"`` (default): all chains in one process as one batched computation;
        ``"sequential"``: one after the other; ``"parallel"``: a process each. Chain i is the same in the last two.
        ``"distributed"``: over the processes of ``torchrun``, or of the process group that there is; see
        :meth:`run`.
    :param str store: ``"memory"``: draws on the device of the chains; ``"disk"``: in files at ``store_path``, in
        constant memory, and read through a mapping (see :func:`open_store`).
    :param store_path: a folder for ``store="disk"``; default ``CHECKPOINT.draws``. One with
        draws of another run is refused.
    :param checkpoint: a file. A run that finds its own checkpoint there continues from it, bit for bit, and one that
        finds it complete returns its draws; a run of another model, data or settings is refused (see
        :mod:`pyro_apd.chains.identity`). Give another file to start over. Draws made so far are kept beside it, in
        ``CHECKPOINT.draws``. While a run writes it, a second one is refused.
    :param int checkpoint_every: draws between checkpoints, warm-up included; default twenty per run.
    :param str gather: with ``"distributed"``, which processes have the draws of all chains after the run: ``"rank0"``
        (default), ``"all"``, or ``"none"``. Others have those of their own chains, in :attr:`chains`.
    :param str split: with ``"distributed"``, what processes share: ``"chains"`` (default), or ``"data"``; see
        :meth:`run`.
    :raises ValueError: if settings are out of range or do not go together.
    """

    #: Numbers of the chains whose draws are here: all, or of a distributed run, those of this process.
    chains: range
    #: The draws of the last run, all of them, and their statistics.
    store: DrawStore | None
    #: Errors of the chains that diverged.
    diverged: list[DivergenceError]
    __repr__, summary = shown, print_summary

    def __init__(
        self,
        kernel: MCMCKernel,
        num_samples: int,
        warmup_steps: int | None = None,
        initial_params: Mapping[str, Tensor] | None = None,
        num_chains: int = 1,
        hook_fn: Hook | None = None,
        mp_context: str | None = None,
        disable_progbar: bool = False,
        disable_validation: bool | None = True,
        transforms: Mapping[str, Transform] | None = None,
        save_params: Sequence[str] | None = None,
        chain_method: str | None = None,
        store: str = "memory",
        store_path: str | os.PathLike[str] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        gather: str | None = None,
        split: str | None = None,
    ) -> None:
        num_samples = integer("num_samples", num_samples)
        num_chains = integer("num_chains", num_chains)
        warmup_steps = None if warmup_steps is None else integer("warmup_steps", warmup_steps, at_least=0)
        check_method(chain_method, gather, split)
        check_kinds(kernel, hook_fn, save_params)
        self._is_ours = callable(getattr(kernel, "begin", None))
        self.chains = range(num_chains)
        self.store, self.diverged = None, []
        checkpoint_path = checked_checkpoint(checkpoint, checkpoint_every)
        folder = checked_store(store, store_path, checkpoint_path)
        if not self._is_ours:
            refuse_files(kernel, folder or checkpoint)
            options = {
                "warmup_steps": warmup_steps,
                "initial_params": initial_params,
                "hook_fn": hook_fn,
                "disable_progbar": disable_progbar,
                "disable_validation": disable_validation,
                "transforms": transforms,
                # Pyro unpacks them in this order.
                "save_params": None if save_params is None else sorted(save_params),
            }
            self._init_as_pyro(kernel, num_samples, num_chains, chain_method, mp_context, options)
            return
        num_warmup = num_samples if warmup_steps is None else warmup_steps
        starts = checked_initial_params(initial_params, num_chains)
        interval = checkpoint_interval(checkpoint_path, checkpoint_every, num_samples + num_warmup)
        settings = Settings(
            Plan(num_samples, num_warmup, num_chains, starts, hook_fn, interval),
            chain_method or "vectorized",
            save_params=None if save_params is None else list(save_params),
            store_path=folder,
            checkpoint_path=checkpoint_path,
            mp_context=mp_context,
            disable_progbar=disable_progbar,
            gather=gather or "rank0",
            split=split or "chains",
        )
        self._init_as_ours(kernel, settings, transforms, disable_validation)

    def _init_as_ours(
        self,
        kernel: MCMCKernel,
        settings: Settings,
        transforms: Mapping[str, Transform] | None,
        disable_validation: bool | None,
    ) -> None:
        """A kernel of this package."""
        plan = settings.plan
        AbstractMCMC.__init__(self, kernel, plan.num_chains, transforms)
        self.chain_method = settings.chain_method
        self.num_samples = plan.num_samples
        self.warmup_steps = plan.warmup_steps
        self.disable_validation = disable_validation
        self._settings = settings
        self._given_transforms = transforms
        self._samples: dict[str, Tensor] | None = None
        self._args: tuple[Any, ...] | None = None
        self._kwargs: dict[str, Any] | None = None
        self._diagnostics: list[dict[str, Any]] = [{"divergences": []} for _ in range(plan.num_chains)]

    def _init_as_pyro(
        self,
        kernel: MCMCKernel,
        num_samples: int,
        num_chains: int,
        chain_method: str | None,
        mp_context: str | None,
        options: dict[str, Any],
    ) -> None:
        """A kernel of Pyro or of others: as Pyro runs it."""
        if chain_method in ("vectorized", "distributed"):
            raise ValueError(
                f"chain_method={chain_method!r} is for this package's kernels; {type(kernel).__name__} runs "
                "'sequential' or 'parallel'."
            )
        is_sequential = chain_method == "sequential" and num_chains > 1
        alone = {"num_chains": 1, "initial_params": None} if is_sequential else {"num_chains": num_chains}
        super().__init__(kernel, num_samples, mp_context=mp_context, **{**options, **alone})
        self.chain_method = chain_method or ("parallel" if num_chains > 1 else "sequential")
        if is_sequential:
            # Pyro's own choice is by the number of cores; its streaming driver always runs one chain after the other.
            self.sampler = StreamingMCMC(kernel, num_samples, num_chains=num_chains, **options).sampler
            self.num_chains = num_chains
            self._diagnostics = [None] * num_chains  # type: ignore[list-item]

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Runs all chains; a second call starts over, or from the checkpoint.

        With ``chain_method="distributed"`` every process makes the same call, with all the data, on its own device.
        Each runs its part of the chains, vectorised: of C chains over R processes C/R, or one more. The start, the
        mini-batches and the noise of chain c follow from the seed and c alone; they do not depend on R. The same R
        gives the same draws again bit for bit. Another R gives them up to rounding: libraries choose their routines by
        the shape of a batch of chains, and the last bits differ by routine. Chains that amplify rounding, and
        ``step_size="auto"`` where a choice depends on the last bits, then agree in distribution.
        What the kernel says at the end (``temperatures``, ``path``) is said of the
        chains of one process together. A ``store="disk"`` is one for all, on a file system that all see, or with
        ``gather="none"`` one for each, at ``STORE_PATH.rank0`` and so on; each process has its checkpoint, at
        ``CHECKPOINT.rank0`` and so on, and resumes with as many processes as there were. Under ``torchrun`` a
        process group is made (gloo, and NCCL for what is on GPUs); one that was initialised is used, and its timeout is
        how long processes wait for the slowest.

        With ``split="data"`` as well, each process gives some of the rows, and all run all chains, by gradients that
        are added up at every step. That is exact: the potential is that of all rows, N of all processes, with the prior
        counted once (what is observed counts as data). ``batch_size`` is rows per process and step; batches differ with
        the number of processes, so that draws agree in distribution, and without mini-batches up to rounding. Steps are
        not compiled. All processes have all draws, of which a ``store="disk"`` is written by each, the first at
        ``STORE_PATH``.

        :param args: the model's arguments, in one of the kernel's three styles.
        :raises DivergenceError: if all chains diverged.
        :raises WorkerError: if a process of a parallel run died.
        :raises CheckpointError: if no checkpoint can be read, it belongs to another run, or another run is writing it.
        :raises OSError: if draws or a checkpoint cannot be written, or draws of another run are at ``store_path``; the
            message says what is intact.
        :raises RankError: if another process of a distributed run is gone.
        """
        if not self._is_ours:
            # Pyro's own run hides itself from handlers around it, like this one; but it takes no lock.
            with one_thread():
                super().run(*args, **kwargs)
            return
        task = LongTask(poutine.block, self._validation)
        with gradients("MCMC.run"), task, new_params_removed(), ExitStack() as stack:
            self._args, self._kwargs = args, kwargs
            replacing = None if self.store is None else self.store.info.get("run")
            self._samples, self.store, self.diverged = None, None, []
            self.chains = range(self.num_chains)
            self._diagnostics = [{"divergences": []} for _ in self.chains]
            # A run computes no gradients of the data.
            args = detached(args)
            run = self._begin(args, kwargs, stack)
            run.replacing = replacing
            try:
                run.sample()
            except KeyboardInterrupt as error:
                if not self._collect(run) or self.store is None:
                    note_checkpoint(error, run.settings.checkpoint_path, "MCMC(...).run()")
                    raise
                chains, num_draws = self.store.complete_part()
                resumes = ", and run() again resumes from the checkpoint" if self._settings.checkpoint_path else ""
                warnings.warn(
                    f"Interrupted: {num_draws} of {self.num_samples} draws of chains {chains} are in get_samples()"
                    f"{resumes}.",
                    RuntimeWarning,
                )
                return
            except BaseException as error:
                self._collect_after(error, run)
                raise
            self._collect(run)
        self._report_divergences(run)

    def _validation(self) -> AbstractContextManager[None]:
        return nullcontext() if self.disable_validation is None else validation(not self.disable_validation)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], stack: ExitStack) -> Run:
        if self.chain_method != "distributed":
            return Run(self.kernel, self._settings, args, kwargs, stack)
        return RankRun(self.kernel, self._settings, args, kwargs, stack, join_process_group())

    def _collect(self, run: Run, in_memory: bool = False) -> int:
        """Takes the draws of the store; returns their number per chain.

        :param in_memory: whether constrained draws are kept in memory where they would be written to the disk.
        """
        if run.store is None:
            return 0
        run.store.flush()
        noted = run.divergences()
        self._num_followed = run.num_followed
        self.store = MemoryStore.adopting(run.settled_store()) if in_memory else run.settled_store()
        self.chains = run.chains
        self.transforms = self.kernel.transforms if self._given_transforms is None else self._given_transforms
        self._samples = self.store.samples(self._given_transforms)
        self.diverged = [rebuilt_error(note) for note in noted]
        # Where all have diverged, the run stopped.
        is_over = len(noted) == run.num_followed
        first = {} if is_over else {note["chain"]: note["first_draw"] for note in noted}
        self._diagnostics = []
        for row, (chain, count) in enumerate(zip(self.chains, self.store.counts, strict=True)):
            statistics = {name: values[row, :count].cpu().clone() for name, values in self.store.statistics.items()}
            divergences = list(range(first.get(chain, self.num_samples), self.num_samples))
            self._diagnostics.append({"divergences": divergences, **statistics, **run.report(chain)})
        return self.store.complete_part()[1]

    def _collect_after(self, error: BaseException, run: Run) -> None:
        """Takes the draws that there are; where their files cannot be read, the error that ended the run says so."""
        try:
            try:
                self._collect(run)
            except OSError:  # a full disk
                self._collect(run, in_memory=True)
        except (OSError, ValueError) as other:
            error.add_note(f"The draws so far are not in get_samples(): {other}")

    def _report_divergences(self, run: Run) -> None:
        """A warning, or the error where no chain is left."""
        if not self.diverged:
            return
        names = self.diverged_chains
        if len(names) < self._num_followed:
            assert self.store is not None
            rows, num_draws = self.store.complete_part()
            warnings.warn(
                f"Chains {names} of {self.num_chains} diverged and stopped. What they drew from there on is left out "
                f"everywhere: get_samples() has {num_draws} draws of chains {[self.chains[row] for row in rows]}, and "
                f"diagnostics()['divergences'] lists what is missing. The first error: {self.diverged[0]}",
                RuntimeWarning,
            )
            return
        error = self.diverged[0]
        parts = [self._samples_of(row) for row in range(len(self.chains))]
        error.draws = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        raise error

    def _samples_of(self, row: int) -> dict[str, Tensor]:
        """All draws of one chain, constrained."""
        assert self.store is not None
        return self.store.layout.constrain(self.store.theta_CSD[row, : self.store.counts[row]])

    def get_samples(self, num_samples: int | None = None, group_by_chain: bool = False) -> dict[str, Tensor]:
        """Draws by site: ``(S, ...)``, chain after chain, or ``(C, S, ...)``; some by chance, as Pyro's.

        :raises ValueError: before :meth:`run`, or if ``num_samples`` is no positive integer.
        """
        self._check_has_run()
        count = None if num_samples is None else integer("num_samples", num_samples)
        return dict(super().get_samples(count, flag("group_by_chain", group_by_chain)))

    def _check_has_run(self) -> None:
        if getattr(self, "_samples", ()) is None:
            raise ValueError("This MCMC has no draws yet: call mcmc.run(...) first.")

    @property
    def missing_chains(self) -> list[int]:
        """Numbers of the chains of which ``get_samples()`` has no draws: they diverged, or were not finished."""
        return [] if self.store is None else [self.chains[row] for row in self.store.missing_chains]

    @property
    def diverged_chains(self) -> list[int]:
        """Numbers of the chains that diverged."""
        return sorted(error.chain for error in self.diverged)

    def diagnostics(self) -> dict[str, Any]:
        """As Pyro's: effective sizes and R-hat by site, and what the kernel recorded, by chain.

        ``divergences`` (indices of draws), and one entry per draw ``potential``, ``grad_norm`` and ``step_size``; of a
        chain that came to its end also ``path``, ``temperatures``, ``excursions``, ``warnings`` and ``tuning``, as in
        the kernel's own. A run that ended with fewer than four draws has only these. Before :meth:`run`,
        ``ValueError`` is raised.
        """
        self._check_has_run()
        if not self._is_ours:
            return dict(super().diagnostics())
        is_long = self.store is None or self.store.complete_part()[1] >= 4
        by_site = dict(diagnostics_by_site(self._samples)) if is_long else {}
        by_chain = list(zip(self.chains, self._diagnostics, strict=True))
        return by_site | {
            name: {f"chain {number}": chain[name] for number, chain in by_chain} for name in self._diagnostics[0]
        }

    def __getstate__(self) -> dict[str, Any]:
        # Samples are views of one buffer, and each view would be pickled with the whole buffer.
        return {**self.__dict__, "_samples": None} if self._is_ours and self.store is not None else self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._is_ours and self.store is not None:
            self._samples = self.store.samples(self._given_transforms)
