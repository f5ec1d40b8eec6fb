# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""From the first step to the last: one chain, or several vectorised as one, drawing into a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_apd.chains.checkpoint import Progress
from pyro_apd.chains.stores.base import DrawStore, kept_columns
from pyro_apd.errors import DivergenceError
from pyro_apd.kernels.engine.chain_set import ChainSet

if TYPE_CHECKING:
    from pyro_apd.kernels.base import StochasticGradientKernel
    from pyro_apd.kernels.engine.chain import Chain

#: Pyro's ``hook_fn(kernel, params, stage, i)``.
Hook = Callable[[MCMCKernel, dict[str, Tensor], str, int], None]


@dataclass(frozen=True)
class Plan:
    """Parameters of a run.

    :ivar int num_samples: draws kept per chain.
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
        """Draws per chain, warm-up included."""
        return self.warmup_steps + self.num_samples


class Listener(Protocol):
    """Receives the progress of a run."""

    def drew(self, chains: ChainSet, num_done: int, num_diverged: int) -> None:
        """A draw was made."""

    def is_due(self, chains: ChainSet, num_done: int) -> bool:
        """Whether a checkpoint is wanted now."""

    def checkpoint(self, chains: ChainSet, progress: Progress) -> None:
        """A checkpoint; draws up to it are in the store."""


def begin(
    kernel: StochasticGradientKernel,
    plan: Plan,
    chains: ChainSet,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Chain:
    """These chains at their start."""
    return kernel.begin(
        args,
        kwargs,
        warmup_steps=plan.warmup_steps,
        num_samples=plan.num_samples,
        chains=chains,
        initial_params=None if plan.initial_params is None else chains.select(plan.initial_params),
    )


class GroupRun:
    """The chains of one group, drawing.

    :param kernel: the kernel, which began the chain.
    :param Chain chain: what ``kernel.begin`` gave.
    :param Plan plan: what the run was asked for.
    :param DrawStore store: where draws go.
    :param Progress progress: how far the group has come; it is kept up to date.
    """

    def __init__(
        self,
        kernel: StochasticGradientKernel,
        chain: Chain,
        plan: Plan,
        store: DrawStore,
        progress: Progress,
    ) -> None:
        self.kernel = kernel
        self.chain = chain
        self.chains = chain.chains
        self.plan = plan
        self.store = store
        self.progress = progress
        self._is_single = self.chains.count is None
        self._known = {d["chain"] for d in progress.divergences}
        if progress.state is not None:
            chain.load_state_dict(progress.state)
            progress.state = None

    @property
    def _theta_CD(self) -> Tensor:
        theta = self.chain.theta
        return theta.unsqueeze(0) if self._is_single else theta

    def run(self, listener: Listener) -> None:
        """Draws to the end. Chains that diverge stay at their checkpoint, and are noted in the progress.

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
            listener.drew(self.chains, progress.num_done, len(progress.divergences))
            if listener.is_due(self.chains, progress.num_done):
                self._checkpoint(listener)
        progress.num_done = plan.total
        # The chain may have diverged since its last check.
        try:
            self.kernel.end(self.chain)
        except DivergenceError as error:
            self._note(error, plan.num_samples)
        self._note_new(plan.num_samples)
        self.progress.report = self.kernel.report(self.chain)
        self._checkpoint(listener, is_finished=True)

    def _advance(self, index: int) -> bool:
        """One draw, kept from ``index`` 0 on; False where all chains have diverged."""
        chain = self.chain
        try:
            chain.advance(self.kernel.thinning)
        except DivergenceError as error:
            self._note_new(max(index, 0))
            self._note(error, max(index, 0))
            return False
        if index >= 0:
            theta_CD = kept_columns(chain.layout, self.store.layout, self._theta_CD)
            self.store.write(self.chains.store_row(self.chains.first), index, theta_CD, chain.statistics())
            chain.observe()
        self._note_new(max(index + 1, 0))
        return True

    def _note_new(self, num_kept: int) -> None:
        for error in self.chain.divergences:
            self._note(error, num_kept)

    def _note(self, error: DivergenceError, num_kept: int) -> None:
        """Removes what a chain drew since its checkpoint, of ``num_kept`` draws: its frozen state is no draw."""
        row = 0 if self._is_single else error.chain
        number = self.chains.first + row
        if number in self._known:
            return
        self._known.add(number)
        place = self.chains.store_row(number)
        first = min(max(error.last_good_step // self.kernel.thinning - self.plan.warmup_steps, 0), num_kept)
        self.progress.divergences.append({**error.to_json(), "chain": number, "first_draw": first})
        self.store.end(place, first)

    def _params(self) -> dict[str, Tensor]:
        """The present state by site, in tensors that later steps do not change."""
        return dict(self.chain.layout.split(self.chain.theta.clone()))

    def _stage(self, index: int) -> tuple[str, int]:
        """Pyro's name of the stage, and the draw's number in it."""
        number = f" [{self.chains.first}]" if self._is_single and self.plan.num_chains > 1 else ""
        return (f"Sample{number}", index) if index >= 0 else (f"Warmup{number}", self.progress.num_done)

    def _checkpoint(self, listener: Listener, is_finished: bool = False) -> None:
        if self.plan.checkpoint_every is None:
            return
        self.store.flush(durably=True)
        state = None if is_finished else self.chain.state_dict()
        done, report = self.progress.num_done, self.progress.report
        listener.checkpoint(self.chains, Progress(done, state, list(self.progress.divergences), report))


def rebuilt_error(note: Mapping[str, Any]) -> DivergenceError:
    """The error that a chain's progress has a note of, without draws."""
    return DivergenceError.from_json({name: value for name, value in note.items() if name != "first_draw"})
