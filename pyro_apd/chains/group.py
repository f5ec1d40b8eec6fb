# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""From the first step to the last: one chain, or several vectorised as one, drawing into a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_apd.chains.checkpoint import Progress
from pyro_apd.chains.stores.base import STATISTICS, DrawStore, kept_columns
from pyro_apd.errors import DivergenceError
from pyro_apd.runtime.ranks import Ranks

Hook = Callable[[Any, dict[str, Tensor], str, int], None]


@dataclass(frozen=True)
class Plan:
    """What a run was asked for.

    :ivar int num_samples: draws kept of a chain.
    :ivar int warmup_steps: draws before them.
    :ivar int num_chains: chains of the whole run.
    :ivar initial_params: unconstrained values by site, ``(C, ...)``; None leaves the start to the kernel.
    :ivar hook: Pyro's ``hook_fn``.
    :ivar checkpoint_every: draws between checkpoints, warm-up included; None for no checkpoints.
    """

    num_samples: int
    warmup_steps: int
    num_chains: int
    initial_params: Mapping[str, Tensor] | None = None
    hook: Hook | None = None
    checkpoint_every: int | None = None

    @property
    def total(self) -> int:
        """Draws of a chain, warm-up included."""
        return self.warmup_steps + self.num_samples


@dataclass(frozen=True)
class Group:
    """Chains that advance together.

    :ivar int first: the first one's number.
    :ivar width: how many, vectorised; None for one chain by itself.
    :ivar row: where in the store the first one's draws go; None for its number.
    :ivar of: chains of the whole run, where others of it are in other processes; else None.
    :ivar fellows: those processes; else None.
    :ivar ranks: processes that run these same chains, each with some of the data; else None.
    """

    first: int
    width: int | None = None
    row: int | None = None
    of: int | None = None
    fellows: Ranks | None = None
    ranks: Ranks | None = None

    @property
    def chains(self) -> range:
        """Their numbers."""
        return range(self.first, self.first + (self.width or 1))

    def row_of(self, chain: int) -> int:
        """Where in the store a chain's draws go."""
        return chain if self.row is None else chain - self.first + self.row


class Listener(Protocol):
    """Who is told how a run goes."""

    def drew(self, group: Group, num_done: int, num_diverged: int) -> None:
        """A draw was made."""

    def is_due(self, group: Group, num_done: int) -> bool:
        """Whether a checkpoint is wanted now."""

    def checkpoint(self, group: Group, progress: Progress) -> None:
        """Here it is; draws up to it are in the store."""


def begin(kernel: Any, plan: Plan, group: Group, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The group's chains at their start."""
    start = plan.initial_params
    if start is not None:
        rows = group.first if group.width is None else slice(group.first, group.first + group.width)
        start = {name: value[rows] for name, value in start.items()}
    shared = {"of_chains": group.of, "fellows": group.fellows, "ranks": group.ranks}
    elsewhere = {name: value for name, value in shared.items() if value is not None}
    return kernel.begin(
        args,
        kwargs,
        warmup_steps=plan.warmup_steps,
        num_samples=plan.num_samples,
        num_chains=group.width,
        first_chain=group.first,
        initial_params=start,
        **elsewhere,
    )


class GroupRun:
    """The chains of one group, drawing.

    :param chain: what ``kernel.begin`` gave.
    :param DrawStore store: where draws go.
    :param Progress progress: how far the group had come; it is kept up to date.
    """

    def __init__(self, kernel: Any, chain: Any, plan: Plan, group: Group, store: DrawStore, progress: Progress) -> None:
        self.kernel, self.chain, self.plan, self.group = kernel, chain, plan, group
        self.store, self.progress = store, progress
        self._is_single = group.width is None
        self._known = {d["chain"] for d in progress.divergences}
        if progress.state is not None:
            chain.load_state_dict(progress.state)
            progress.state = None

    @property
    def _theta_CD(self) -> Tensor:
        theta: Tensor = self.chain.theta
        return theta.unsqueeze(0) if self._is_single else theta

    def run(self, listener: Listener) -> None:
        """Draws to the end. Chains that diverge stay where they were last well, and are noted in the progress.

        :raises DivergenceError: if all chains of a vectorised group diverged; what a single chain raises is noted only.
        """
        plan, progress = self.plan, self.progress
        has_latents, hook = len(self.chain.layout) > 0, plan.hook
        while progress.num_done < plan.total:
            index = progress.num_done - plan.warmup_steps
            if index == 0:
                self.chain.end_warmup()
            if has_latents and not self._advance(index):
                break
            if hook is not None:
                hook(self.kernel, self._params(), *self._stage(index))
            progress.num_done += 1
            listener.drew(self.group, progress.num_done, len(progress.divergences))
            if listener.is_due(self.group, progress.num_done):
                self._checkpoint(listener)
        progress.num_done = plan.total
        # The last steps may have run away since the chain last looked.
        try:
            self.kernel.end(self.chain)
        except DivergenceError as error:
            self._note(error, plan.num_samples)
        self._note_new(plan.num_samples)
        self.progress.report = self.kernel.report(self.chain)
        self._checkpoint(listener, is_finished=True)

    def _advance(self, index: int) -> bool:
        """One draw, kept from ``index`` 0 on; False where no chain is left to go on."""
        chain = self.chain
        try:
            chain.advance(self.kernel.thinning)
        except DivergenceError as error:
            self._note_new(max(index, 0))
            self._note(error, max(index, 0))
            return False
        if index >= 0:
            theta_CD = kept_columns(chain.layout, self.store.layout, self._theta_CD)
            self.store.write(self.group.row_of(self.group.first), index, theta_CD, chain.statistics())
            chain.observe()
        self._note_new(max(index + 1, 0))
        return True

    def _note_new(self, num_kept: int) -> None:
        for error in self.chain.divergences:
            self._note(error, num_kept)

    def _note(self, error: DivergenceError, num_kept: int) -> None:
        """Puts the frozen state in place of what a chain drew since it was last seen well, of ``num_kept`` draws."""
        row = 0 if self._is_single else error.chain
        number = self.group.first + row
        if number in self._known:
            return
        self._known.add(number)
        place = self.group.row_of(number)
        first = min(max(error.last_good_step // self.kernel.thinning - self.plan.warmup_steps, 0), num_kept)
        self.progress.divergences.append({**error.to_json(), "chain": number, "first_draw": first})
        if self.plan.num_chains == 1:
            self.store.truncate(place, first)
            return
        stop = self.plan.num_samples if self._is_single else num_kept
        if first == 0 and stop > 0:
            theta_CD = self.chain.state_dict()["last_good"].reshape(-1, self.chain.layout.size)[row : row + 1]
            figures = dict.fromkeys(STATISTICS, torch.nan) | {"step_size": error.step_size}
            self.store.write(place, 0, kept_columns(self.chain.layout, self.store.layout, theta_CD), figures)
        self.store.freeze(place, max(first, 1), stop)

    def _params(self) -> dict[str, Tensor]:
        """The present state by site, in tensors that later steps do not change."""
        return dict(self.chain.layout.split(self.chain.theta.clone()))

    def _stage(self, index: int) -> tuple[str, int]:
        """Pyro's name for what goes on, and the draw's number in it."""
        number = f" [{self.group.first}]" if self._is_single and self.plan.num_chains > 1 else ""
        return (f"Sample{number}", index) if index >= 0 else (f"Warmup{number}", self.progress.num_done)

    def _checkpoint(self, listener: Listener, is_finished: bool = False) -> None:
        if self.plan.checkpoint_every is None:
            return
        self.store.flush(durably=True)
        state = None if is_finished else self.chain.state_dict()
        done, report = self.progress.num_done, self.progress.report
        listener.checkpoint(self.group, Progress(done, state, list(self.progress.divergences), report))


def rebuilt_error(note: Mapping[str, Any]) -> DivergenceError:
    """The error that a note in a chain's progress speaks of, without draws."""
    return DivergenceError.from_json({name: value for name, value in note.items() if name != "first_draw"})
