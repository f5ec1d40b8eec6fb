# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Chains over the processes of a job: each runs its own, vectorised, and the draws are gathered at the end.

A chain depends on its number in the whole run alone. While chains run, processes do not communicate; only a step size
that is adapted is one for all chains, and so found together during warm-up.

Or each process has some of the data, and all run all chains in step (:mod:`pyro_apd.kernels.engine.data_parallel`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_apd.chains.checkpoint import (
    Checkpoint,
    CheckpointError,
    Progress,
    previous_path,
    read_file,
)
from pyro_apd.chains.identity import constructor_settings, describe
from pyro_apd.chains.run import Run
from pyro_apd.chains.settings import Settings
from pyro_apd.chains.stores.base import DrawStore, MemoryStore
from pyro_apd.chains.stores.disk import DiskStore, open_store
from pyro_apd.kernels.engine.chain_set import ChainSet
from pyro_apd.models.layout import Layout
from pyro_apd.runtime.ranks import Ranks
from pyro_apd.runtime.seeds import fresh_seed
from pyro_apd.runtime.trees import tree_leaves

if TYPE_CHECKING:
    from pyro_apd.kernels.base import StochasticGradientKernel
    from pyro_apd.kernels.engine.chain import Chain


class RankRun(Run):
    """One process's part of a run.

    A store on disk is one for all, in which each writes the rows of its chains; unless nothing is gathered, when each
    has its own, as it has in memory.

    With another ``chain_method`` than ``"distributed"`` it is a :class:`~pyro_apd.chains.run.Run`.

    :param Ranks ranks: this process among all.
    :raises ValueError: if there are more processes than chains.
    """

    def __init__(
        self,
        kernel: StochasticGradientKernel,
        settings: Settings,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        stack: ExitStack,
        ranks: Ranks,
    ) -> None:
        self._is_part = settings.chain_method == "distributed"
        super().__init__(kernel, _of_rank(settings, ranks) if self._is_part else settings, args, kwargs, stack)
        num_chains = self.plan.num_chains
        self.ranks = ranks
        self.own = self.chains
        self._is_shared = False
        self._is_exchanged = False
        #: Whether processes wait for each other before each checkpoint, so that there always is one that all have.
        self.is_in_step = False
        if not self._is_part:
            return
        if self.settings.split == "data":
            self.is_in_step = True
            self.groups = [ChainSet(0, num_chains, data_ranks=ranks)]
            self.progress = {0: Progress()}
            return
        # All processes find a step size together: none may resume from before a measure and others from after it.
        self.is_in_step = getattr(kernel, "schedule", ...) is None
        if num_chains < ranks.size:
            raise ValueError(
                f"num_chains={num_chains} leaves some of {ranks.size} processes without a chain: ask for at least "
                f"{ranks.size} chains, or start fewer processes."
            )
        self.own = ranks.shard(num_chains)
        self._is_shared = self.settings.store_path is not None and self.settings.gather != "none"
        self.chains = range(num_chains) if self._is_shared else self.own
        row = self.own.start if self._is_shared else 0
        self.groups = [ChainSet(self.own.start, len(self.own), total=num_chains, first_row=row, peer_ranks=ranks)]
        self.progress = {self.own.start: Progress()}

    def sample(self) -> None:
        """This process's chains; then all processes exchange the outcomes of theirs.

        :raises RankError: if another process is gone.
        """
        super().sample()
        assert self.store is not None
        self.store.flush()
        if self.settings.gather == "none" or self.settings.split == "data":
            return
        mine = {first: dataclasses.replace(progress, state=None) for first, progress in self.progress.items()}
        for theirs in self.ranks.gathered(mine):
            self.progress.update(theirs)
        self._is_exchanged = True

    @property
    def num_followed(self) -> int:
        """Number of chains whose outcome is known here."""
        return self.plan.num_chains if self._is_exchanged else len(self.own)

    def settled_store(self) -> DrawStore:
        """The store as the caller asked for it: of all chains where they were gathered, else of this process's."""
        if self._is_shared:
            assert self.store is not None
            if self.ranks.rank == 0:
                return self.store
            # Constrained draws are written beside the others by one process alone.
            if self._is_exchanged and self.settings.gather == "all":
                return MemoryStore.adopting(self.store)
            self.chains = self.own
            return MemoryStore.adopting(self.store, self.own)
        own = super().settled_store()
        if not self._is_exchanged:
            return own
        whole = self.gathered(own)
        if whole is None:
            return own
        self.chains = range(self.plan.num_chains)
        return whole

    def gathered(self, own: DrawStore) -> DrawStore | None:
        """The draws of all processes, on those that gather them; None elsewhere.

        :param own: draws of this process's chains.
        :raises RankError: if another process is gone.
        """
        to_all, num_chains = self.settings.gather == "all", self.plan.num_chains
        if self.ranks.size == 1:
            return own
        is_taking = to_all or self.ranks.rank == 0
        counts = [count for part in self.ranks.gathered(own.counts) for count in part]
        whole = MemoryStore(own.layout, num_chains if is_taking else 0, own.num_draws, own.theta_CSD.new_empty(0))
        whole.info = own.info
        for source in range(self.ranks.size):
            for chain in self.ranks.shard(num_chains, source):
                self._pass_on(own, whole, chain, counts[chain], source, to_all)
        self.ranks.barrier()
        if not is_taking:
            return None
        whole.counts[:] = counts
        return whole

    def _pass_on(self, own: DrawStore, whole: MemoryStore, chain: int, count: int, source: int, to_all: bool) -> None:
        """A chain's draws and their statistics, a block at a time."""
        transfer = self.ranks.broadcast if to_all else self.ranks.send_to_first
        row = chain - self.own.start
        for start, stop in own.blocks(count):
            parts = [(own.theta_CSD, whole.theta_CSD)]
            parts += [(own.statistics[name], whole.statistics[name]) for name in sorted(whole.statistics)]
            for ours, all_of_it in parts:
                room = all_of_it[chain, start:stop] if len(all_of_it) else None
                if source == self.ranks.rank:
                    values: Tensor = ours[row, start:stop]
                    if room is not None:
                        room.copy_(values)
                    transfer(values, source)
                elif room is not None:
                    transfer(room, source)

    def _read(self) -> Checkpoint | None:
        """The checkpoint to go on from, if all processes have one of the same run."""
        self.ranks.check_same(self._asked())
        saved = super()._read()
        if self._path is None:
            return None
        names = self.ranks.gathered(saved and saved.notes.get("run"))
        has_begun = self.ranks.gathered(saved is not None and self._has_begun(saved))
        if len(set(names)) == 1:
            return saved if saved is None or not self.is_in_step else self._common(saved)
        if not any(has_begun):
            return None
        raise CheckpointError(
            f"Checkpoints of {self.ranks.size} processes, '{self._path}' and its like, are of different runs "
            f"({dict(enumerate(names))}; None: there is none). Start as many processes as there were, or give "
            "another checkpoint= to start the run over."
        )

    def _has_begun(self, saved: Checkpoint) -> bool:
        """Whether other processes must have a checkpoint where this one has it."""
        if self.is_in_step:
            return bool(saved.notes.get("written", 0) > 1)
        return any(progress.num_done > 0 for progress in saved.chains.values())

    def _common(self, saved: Checkpoint) -> Checkpoint:
        """The last checkpoint that all processes have."""
        common = min(self.ranks.gathered(saved.notes.get("written", 0)))
        if saved.notes.get("written", 0) == common:
            return saved
        assert self._path is not None
        earlier = read_file(previous_path(self._path))
        if (earlier.notes.get("run"), earlier.notes.get("written", 0)) != (saved.notes["run"], common):
            raise CheckpointError(
                f"'{self._path}' and the checkpoint before it are ahead of those of other processes. Give another "
                "checkpoint= to start the run over."
            )
        return earlier

    def checkpoint(self, chains: ChainSet, progress: Progress) -> None:
        """Writes it; where processes go in step, once all are here."""
        self.meet_before_writing()
        super().checkpoint(chains, progress)

    def meet_before_writing(self) -> None:
        """A barrier: no checkpoint of a process is more than one ahead of another's.

        :raises RankError: if another process is gone.
        """
        if self.is_in_step:
            self.ranks.barrier()
            self._notes["written"] = self._notes.get("written", 0) + 1

    def _asked(self) -> dict[str, Any]:
        """What has to be the same on all processes, by name."""
        plan = self.plan
        skipped = 1 if self.settings.split == "data" else 0  # numbers of rows may differ then
        leaves = tree_leaves((self.args, self.kwargs))
        settings = {name: describe(value) for name, value in constructor_settings(self.kernel).items()}
        return {
            "kernel": type(self.kernel).__name__,
            **settings,
            "seed": self.kernel.seed,
            "num_samples": plan.num_samples,
            "warmup_steps": plan.warmup_steps,
            "num_chains": plan.num_chains,
            "gather": self.settings.gather,
            "store": self.settings.store_path is not None,
            "checkpoint": self._path is not None,
            "split": self.settings.split,
            "the shapes of the data": [tuple(leaf.shape)[skipped:] for leaf in leaves if isinstance(leaf, Tensor)],
        }

    def _seed(self, saved: Checkpoint | None) -> int | None:
        known = super()._seed(saved)
        if known is not None or self.kernel.seed is not None:
            return known
        return int(self.ranks.broadcast_object(fresh_seed()))

    def _name(self) -> str:
        return str(self.ranks.broadcast_object(super()._name()))

    def _create(self, path: Path, kept: Layout, dtype: torch.dtype, info: Mapping[str, Any]) -> DiskStore:
        if not self._is_shared:
            return super()._create(path, kept, dtype, info)
        store = super()._create(path, kept, dtype, info) if self.ranks.rank == 0 else None
        self.ranks.barrier()
        if store is None:
            store = open_store(path)
            store.layout = kept
        return store

    def _own_files(self) -> dict[str, Path]:
        files = super()._own_files()
        if self._is_shared and self.ranks.rank > 0:
            files.pop("store_path")
        return files

    def _describe(self, chain: Chain) -> dict[str, Any]:
        place = {"rank and number of processes": [self.ranks.rank, self.ranks.size]} if self._is_part else {}
        return {**super()._describe(chain), **place}


def _of_rank(settings: Settings, ranks: Ranks) -> Settings:
    """Files of this process alone, where it has some, and a progress bar on the first only."""
    checkpoint, store = settings.checkpoint_path, settings.store_path
    if checkpoint is not None:
        checkpoint = path_of_rank(checkpoint, ranks.rank)
    if store is not None and (settings.gather == "none" or (settings.split == "data" and ranks.rank > 0)):
        store = path_of_rank(store, ranks.rank)
    is_quiet = settings.disable_progbar or ranks.rank > 0
    return dataclasses.replace(settings, checkpoint_path=checkpoint, store_path=store, disable_progbar=is_quiet)


def path_of_rank(path: Path, rank: int) -> Path:
    """The file of one process, where the user gave ``path``."""
    return path.with_name(f"{path.name}.rank{rank}")
