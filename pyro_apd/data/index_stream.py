# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The row indices of mini-batches: epochs without replacement, or independent draws.

An epoch is a table, :func:`torch.randperm` of all N rows, which takes 8 N bytes per chain and 10 to 80 ns per row:
80 MB and 0.6 s at 10^7 rows, 800 MB and 8 s at 10^8, on one core. Beyond :data:`MAX_EPOCH_ROWS` rows are drawn
independently, without a table, for 6 to 35 ns each in batches of 256 rows or more (210 to 240 ns in batches of 32). A
permutation that is computed at each position (a Feistel network) needs no table either, but took 150 to 210 ns per row
in such batches (300 to 390 ns in batches of 32) on the same core.

Epochs of that length have little effect. With batches of B rows without replacement, the variance of the gradient is
(N - B) / (N - 1) of that with independent rows. The noise of an epoch cancels only in directions in which the chain
moves more slowly than an epoch of N / B steps (:mod:`pyro_apd.kernels.adaptation.dynamics`), and
:func:`batches_per_epoch` reports no epoch, so that a step size is chosen for independent rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

#: One generator for one chain; a list of C for C chains that advance together.
Generators = torch.Generator | Sequence[torch.Generator]

#: Rows up to which mini-batches come in epochs without replacement.
MAX_EPOCH_ROWS = 10**7


def generator_states(generators: Generators) -> list[Tensor]:
    """State of each generator."""
    return [generator.get_state() for generator in _listed(generators)]


def set_generator_states(generators: Generators, states: Sequence[Tensor]) -> None:
    """Inverse of :func:`generator_states`."""
    for generator, state in zip(_listed(generators), states, strict=True):
        generator.set_state(state)


def _listed(generators: Generators) -> Sequence[torch.Generator]:
    return [generators] if isinstance(generators, torch.Generator) else generators


class Indices(Protocol):
    """An endless iterator of batches of indices: ``(B,)`` with one generator, ``(C, B)`` with a list of C."""

    def __next__(self) -> Tensor: ...

    def state_dict(self) -> dict[str, Any]:
        """The position of the stream, without its generators."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a position. The caller sets the generators afterwards."""


def batches_per_epoch(num_data: int, batch_size: int, replacement: bool) -> int | None:
    """Batches of :func:`index_stream` per epoch without replacement; None where rows are drawn independently."""
    return None if replacement or num_data > MAX_EPOCH_ROWS else num_data // batch_size


def index_stream(num_data: int, batch_size: int, generators: Generators, replacement: bool = False) -> Indices:
    """Batches of ``batch_size`` indices out of ``num_data``.

    :param bool replacement: draw each index independently. Otherwise up to :data:`MAX_EPOCH_ROWS` rows come in epochs,
        in which each occurs at most once; more rows are drawn independently, too.
    """
    if batches_per_epoch(num_data, batch_size, replacement) is None:
        return IndependentStream(num_data, batch_size, generators)
    return EpochStream(num_data, batch_size, generators)


class EpochStream:
    """Batches of ``batch_size`` distinct indices out of ``num_data``: epochs without replacement.

    A permutation serves ``num_data // batch_size`` batches, so the cost per batch is O(batch_size). The remainder of an
    epoch is dropped. The next epoch has another permutation, so every batch is a uniform random subset.

    :param generators: one generator gives indices ``(B,)``; a list of C, one per chain, gives ``(C, B)``.
    """

    def __init__(self, num_data: int, batch_size: int, generators: Generators) -> None:
        self.num_data = num_data
        self.batch_size = batch_size
        self._generators = generators
        self._position = num_data
        self._before_epoch = generator_states(generators)

    def __next__(self) -> Tensor:
        if self._position + self.batch_size > self.num_data:
            self._shuffle()
        self._position += self.batch_size
        return self._epoch[self._position // self.batch_size - 1]

    def _shuffle(self) -> None:
        self._before_epoch = generator_states(self._generators)
        if isinstance(self._generators, torch.Generator):
            self._epoch = self._batches(self._generators)
        else:  # stacked in this order, the batches of each step are contiguous
            self._epoch = torch.stack([self._batches(generator) for generator in self._generators], 1)
        self._position = 0

    def _batches(self, generator: torch.Generator) -> Tensor:
        order = torch.randperm(self.num_data, generator=generator, device=generator.device)
        return order[: self.num_data - self.num_data % self.batch_size].view(-1, self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """The position of the stream."""
        return {"before_epoch": list(self._before_epoch), "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a position. The generators are left in their state after the permutation of its epoch."""
        if state["position"] + self.batch_size <= self.num_data:  # otherwise the next batch starts a new epoch
            set_generator_states(self._generators, state["before_epoch"])
            self._shuffle()
        self._before_epoch = list(state["before_epoch"])
        self._position = int(state["position"])


class IndependentStream:
    """Batches of ``batch_size`` indices, each drawn uniformly and independently: with replacement."""

    def __init__(self, num_data: int, batch_size: int, generators: Generators) -> None:
        self.num_data = num_data
        self.batch_size = batch_size
        self._generators = generators

    def __next__(self) -> Tensor:
        if isinstance(self._generators, torch.Generator):
            return self._drawn(self._generators)
        return torch.stack([self._drawn(generator) for generator in self._generators])

    def _drawn(self, generator: torch.Generator) -> Tensor:
        return torch.randint(self.num_data, (self.batch_size,), generator=generator, device=generator.device)

    def state_dict(self) -> dict[str, Any]:
        """Empty: the position is the state of the generators."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`state_dict`."""
