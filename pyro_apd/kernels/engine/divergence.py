# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Chains that diverge: how they are detected, the state they are put back to, and the error that describes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_apd.errors import DataError, DivergenceError
from pyro_apd.kernels.adaptation.curvature import hessian_product, largest_curvature
from pyro_apd.models.layout import Layout
from pyro_apd.models.potential import Inputs, Pieces

#: Langevin steps between checks. A check waits for the device, so it is not made at every step.
CHECK_EVERY = 50
# A potential that rose by this many times its scale at the start has diverged.
_MAX_RISE = 1e3
# Products with the Hessian for the largest curvature.
_NUM_PRODUCTS = 15


@dataclass(frozen=True)
class LastStep:
    """The step after which chains were found to have diverged.

    :ivar int step: Langevin steps taken.
    :ivar float step_size: of the last one.
    :ivar Tensor energy: U before it, ``()`` or ``(C,)``.
    :ivar theta: the state after it, by site.
    :ivar inputs: its mini-batch.
    """

    step: int
    step_size: float
    energy: Tensor
    theta: Pieces
    inputs: Inputs


class DivergenceWatch:
    """Detects chains that have diverged, and keeps a state of each from before.

    The potential of a state is known one step later. So the state at a check is a *candidate* first, and becomes the
    *checkpoint* that chains are put back to once the next check finds no divergence.

    :param theta: the start, by site, ``(n,)`` or ``(C, n)``.
    :param Tensor like: a state ``(D,)`` or ``(C, D)``, whose shape, dtype and device states have.
    :param float scale: number by which a rise of the potential is judged, beside its size at the start.
    :ivar Tensor is_frozen: which chains stay at their checkpoint, ``()`` or ``(C,)``, on the CPU.
    :ivar divergences: errors of the frozen chains, each with its index among the chains here.
    :ivar int checked_step: Langevin step of the last check.
    :ivar int num_safe_draws: draws that were kept before the last check.
    """

    def __init__(self, theta: Pieces, like: Tensor, scale: float) -> None:
        self._like = like.new_empty(0)
        self._scale = scale
        self._is_single = like.dim() == 1
        self._candidate = tuple(piece.clone() for piece in theta)
        self._checkpoint = tuple(piece.clone() for piece in theta)
        self.energy_at_start: Tensor | None = None
        self.is_frozen = torch.zeros(like.shape[:-1], dtype=torch.bool)
        self.divergences: list[DivergenceError] = []
        self.checked_step = 0
        self.num_safe_draws = 0

    @property
    def checkpoint(self) -> Tensor:
        """The state that chains are put back to, ``(D,)`` or ``(C, D)``."""
        return torch.cat(self._checkpoint, -1) if self._checkpoint else self._like

    @property
    def last_good_step(self) -> int:
        """Langevin step of the last state whose potential was checked."""
        return max(self.checked_step - 1, 0)

    def checkpoint_of(self, chain: int) -> Pieces:
        """The checkpoint of one chain, by site."""
        return of_chain(self._checkpoint, None if self._is_single else chain)

    def is_finite(self, energy: Tensor) -> bool:
        """Whether the potential of every chain that is not frozen is finite. Waits for the device."""
        if self._is_single:
            return math.isfinite(float(energy))
        return bool((torch.isfinite(energy) | self.is_frozen).all())

    def diverged(self, energy: Tensor, theta: Pieces) -> list[int]:
        """Indices of the chains that have diverged since the last check. Waits for the device.

        A chain has diverged where its state or potential is not finite, or its potential rose far above its start.
        """
        if self.energy_at_start is None:
            self.energy_at_start = energy.clone()
        scale = self.energy_at_start.abs() + self._scale
        is_good = torch.isfinite(energy) & (energy - self.energy_at_start < _MAX_RISE * scale)
        if theta:  # sums are not finite where an entry is not, at a quarter of the calls
            sums = torch.stack([torch.linalg.vector_norm(piece, 1, -1) for piece in theta])
            is_good &= torch.isfinite(sums).all(0)
        is_good = is_good.cpu() | self.is_frozen
        return [int(chain) for chain in torch.nonzero(~is_good.reshape(-1)).flatten()]

    def freeze(self, errors: Sequence[DivergenceError]) -> None:
        """Freezes the chains of these errors."""
        self.divergences += errors
        self.is_frozen[[error.chain for error in errors]] = True

    def put_back(self, chains: Sequence[int], theta: Pieces) -> None:
        """Sets chains of ``theta`` to their checkpoint, in place."""
        for chain in chains:
            row = ... if self._is_single else chain
            for piece, candidate, checkpoint in zip(theta, self._candidate, self._checkpoint, strict=True):
                piece[row] = candidate[row] = checkpoint[row]

    def passed(self, theta: Pieces, step: int, num_draws: int, is_outside: Tensor | None = None) -> None:
        """Ends a check: the candidate becomes the checkpoint, and the present state the candidate.

        :param is_outside: chains on an excursion, ``()`` or ``(C,)``, which keep candidate and checkpoint from before;
            None for none, which is quicker.
        """
        if is_outside is None:
            self._checkpoint, self._candidate = self._candidate, self._checkpoint
            for candidate, piece in zip(self._candidate, theta, strict=True):
                candidate.copy_(piece)
        else:
            for checkpoint, candidate, piece in zip(self._checkpoint, self._candidate, theta, strict=True):
                checkpoint.copy_(torch.where(is_outside.unsqueeze(-1), checkpoint, candidate))
                candidate.copy_(torch.where(is_outside.unsqueeze(-1), candidate, piece))
        self.checked_step = step
        self.num_safe_draws = num_draws

    def state_dict(self) -> dict[str, Any]:
        """All that later checks depend on."""
        return {
            "energy_at_start": self.energy_at_start,
            "is_frozen": self.is_frozen.clone(),
            "checkpoint": [piece.clone() for piece in self._checkpoint],
            "candidate": [piece.clone() for piece in self._candidate],
            "checked_step": self.checked_step,
            "divergences": [error.to_json() for error in self.divergences],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.energy_at_start = state["energy_at_start"]
        self.is_frozen = state["is_frozen"].clone()
        for pieces, name in ((self._checkpoint, "checkpoint"), (self._candidate, "candidate")):
            for piece, saved in zip(pieces, state[name], strict=True):
                piece.copy_(saved)
        self.checked_step = int(state["checked_step"])
        self.divergences = [DivergenceError.from_json(error) for error in state["divergences"]]


class Rewind:
    """Puts auxiliary state back to what it was at the checkpoint of theta.

    :param pieces: the state, ``(n,)`` or ``(C, n)`` each, which is changed in place.
    """

    def __init__(self, pieces: Sequence[Tensor]) -> None:
        self._pieces = list(pieces)
        self._candidate = [piece.clone() for piece in pieces]
        self._checkpoint = [piece.clone() for piece in pieces]

    def put_back(self, chains: Sequence[int], is_single: bool) -> None:
        """Sets chains to their checkpoint."""
        for chain in chains:
            row = ... if is_single else chain
            for piece, candidate, checkpoint in zip(self._pieces, self._candidate, self._checkpoint, strict=True):
                piece[row] = candidate[row] = checkpoint[row]

    def passed(self) -> None:
        """Ends a check: the candidate becomes the checkpoint, and the present state the candidate."""
        for piece, candidate, checkpoint in zip(self._pieces, self._candidate, self._checkpoint, strict=True):
            checkpoint.copy_(candidate)
            candidate.copy_(piece)

    def state_dict(self) -> dict[str, Any]:
        """What later checks depend on."""
        return {name: [piece.clone() for piece in getattr(self, f"_{name}")] for name in ("candidate", "checkpoint")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        for name in ("candidate", "checkpoint"):
            for piece, saved in zip(getattr(self, f"_{name}"), state[name], strict=True):
                piece.copy_(saved)


@dataclass(frozen=True)
class DivergenceReport:
    """Writes the error of a chain that diverged.

    :ivar str name: the sampler's name.
    :ivar Layout layout: the sites.
    :ivar gradient: gradient of U ``(D,)`` and U at a state ``(D,)``, on a batch.
    :ivar first_number: number of the first chain here, in messages; None for a single chain, which needs none.
    """

    name: str
    layout: Layout
    gradient: Callable[[Tensor, Inputs], tuple[Tensor, Tensor]]
    first_number: int | None

    def error(self, chain: int, last: LastStep, watch: DivergenceWatch, draws: Sequence[Tensor]) -> DivergenceError:
        """The error of one chain, by its index here.

        :param draws: unconstrained draws of the chain from before, ``(D,)`` each.
        :raises DataError: if the start has no finite potential.
        """
        assert watch.energy_at_start is not None
        energy = float(last.energy.reshape(-1)[chain])
        start = float(watch.energy_at_start.reshape(-1)[chain])
        if last.step == 1 and not math.isfinite(energy):
            raise DataError(
                f"The potential is {energy} at the starting point. Start elsewhere with init_strategy= or "
                "initial_params=, or check the data for values outside the likelihood's support."
            )
        index = None if self.first_number is None else chain
        reach = [float(piece.abs().nan_to_num(math.inf).max()) for piece in of_chain(last.theta, index)]
        site, furthest = max(zip(self.layout.names, reach, strict=True), key=lambda pair: pair[1])
        safe = torch.cat(watch.checkpoint_of(chain))
        curvature, suggested = self._stable_step_size(safe, of_chain(last.inputs, index), last.step_size)
        kept = torch.stack(list(draws)) if draws else safe.new_empty(0, self.layout.size)
        which = "" if self.first_number is None else f" in chain {self.first_number + chain}"
        return DivergenceError(
            f"{self.name} diverged{which} by Langevin step {last.step}: potential {energy:.3g}, at the start "
            f"{start:.3g}; site '{site}' at |value| {furthest:.3g}, with step_size={last.step_size:.3g}. The largest "
            f"curvature met is about {curvature:.2g}, so step sizes must stay under {4 / curvature:.2g}; try "
            f"step_size={suggested:.0e}. The draws made before are in this error's `draws`.",
            step=last.step,
            site=site,
            step_size=last.step_size,
            suggested_step_size=suggested,
            draws=self.layout.constrain(kept),
            chain=chain,
            last_good_step=watch.last_good_step,
        )

    def _stable_step_size(self, theta: Tensor, inputs: Inputs, step_size: float) -> tuple[float, float]:
        """Largest curvature of U at ``theta`` ``(D,)``, and a step size that is stable there.

        Langevin steps are stable below 4 / curvature; a tenth of that inflates the variance there by about 11 %.
        """

        def product(direction: Tensor) -> Tensor:
            return hessian_product(lambda at: self.gradient(at, inputs)[0], theta, direction)

        start = torch.randn(theta.shape, generator=torch.Generator().manual_seed(0)).to(theta)
        curvature = float(largest_curvature(product, start, _NUM_PRODUCTS))
        is_known = math.isfinite(curvature) and curvature > 0
        suggested = min(0.4 / curvature if is_known else math.inf, step_size / 10)
        exponent = math.floor(math.log10(suggested))
        return curvature if is_known else 4 / step_size, math.floor(suggested / 10**exponent) * 10**exponent


def of_chain(tensors: Sequence[Tensor], chain: int | None) -> tuple[Tensor, ...]:
    """The tensors of one of several chains; all of them where there is a single chain, None."""
    return tuple(tensors) if chain is None else tuple(tensor[chain] for tensor in tensors)
