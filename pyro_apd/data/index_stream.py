# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Which rows are in the next mini-batch: epochs without replacement, or independent draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pyro_apd.data.permutation import Permutation

#: One generator for one chain; a list of C for C chains that advance together.
Generators = torch.Generator | Sequence[torch.Generator]

#: Rows up to which an epoch is a shuffled table, a megabyte a chain. Beyond, it is a permutation without a table.
TABLE_ROWS = 2**17
# Positions that a permutation is asked for at once, so that its calls from Python are not felt.
_AT_ONCE = 4096


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
        """Where the stream is, but for its generators."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where a stream was. The generators are its caller's to set afterwards."""


def index_stream(num_data: int, batch_size: int, generators: Generators, replacement: bool = False) -> Indices:
    """Batches of ``batch_size`` indices out of ``num_data``.

    :param bool replacement: draw each index by itself; otherwise in epochs, in which each occurs at most once.
    """
    if replacement:
        return IndependentStream(num_data, batch_size, generators)
    kind = IndexStream if num_data <= TABLE_ROWS else LongIndexStream
    return kind(num_data, batch_size, generators)


class IndexStream:
    """Batches of ``batch_size`` distinct indices out of ``num_data``: epochs without replacement.

    A permutation serves ``num_data // batch_size`` batches, so its cost for each is O(batch_size). The remainder of an
    epoch is dropped; the next epoch is shuffled afresh, so every batch is a uniform random subset.

    :param generators: one generator gives indices ``(B,)``; a list of C, one a chain, gives ``(C, B)``.
    """

    def __init__(self, num_data: int, batch_size: int, generators: Generators) -> None:
        self.num_data, self.batch_size = num_data, batch_size
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
        else:  # stacked so that each step's batches are contiguous
            self._epoch = torch.stack([self._batches(generator) for generator in self._generators], 1)
        self._position = 0

    def _batches(self, generator: torch.Generator) -> Tensor:
        order = torch.randperm(self.num_data, generator=generator, device=generator.device)
        return order[: self.num_data - self.num_data % self.batch_size].view(-1, self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        return {"before_epoch": list(self._before_epoch), "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where a stream was. The generators are left just behind its present epoch."""
        if state["position"] + self.batch_size <= self.num_data:  # else the next batch begins an epoch by itself
            set_generator_states(self._generators, state["before_epoch"])
            self._shuffle()
        self._before_epoch, self._position = list(state["before_epoch"]), int(state["position"])


class LongIndexStream:
    """As :class:`IndexStream`, in memory and time that do not depend on ``num_data``.

    Epoch e of a chain is :class:`~pyro_apd.data.permutation.Permutation` number e under a key that its generator gave.
    It is worked out on the host, some thousand rows at a time, and sent without waiting: on a GPU no step waits for it.
    """

    def __init__(self, num_data: int, batch_size: int, generators: Generators) -> None:
        self.num_data, self.batch_size = num_data, batch_size
        listed = _listed(generators)
        self._is_one, self._device = isinstance(generators, torch.Generator), listed[0].device
        self._keys = [int(torch.randint(2**62, (), generator=g, device=g.device)) for g in listed]
        self._num_drawn = self._first = 0
        self._ready: Tensor = torch.empty(0)

    def __next__(self) -> Tensor:
        if not self._first <= self._num_drawn < self._first + len(self._ready):
            self._prepare()
        batch = self._ready[self._num_drawn - self._first]
        self._num_drawn += 1
        return batch

    def _prepare(self) -> None:
        """The next batches of this epoch, ``(K, B)`` or ``(K, C, B)``."""
        per_epoch = self.num_data // self.batch_size
        epoch, batch = divmod(self._num_drawn, per_epoch)
        stop = min(batch + max(1, _AT_ONCE // self.batch_size), per_epoch)
        positions = np.arange(batch * self.batch_size, stop * self.batch_size).reshape(-1, self.batch_size)
        by_chain = [Permutation(self.num_data, key, epoch)(positions) for key in self._keys]
        ready = torch.from_numpy(by_chain[0] if self._is_one else np.stack(by_chain, 1))
        if self._device.type == "cuda":
            ready = ready.pin_memory()
        self._ready, self._first = ready.to(self._device, non_blocking=True), self._num_drawn

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        return {"keys": list(self._keys), "num_drawn": self._num_drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where a stream was."""
        self._keys, self._num_drawn = [int(key) for key in state["keys"]], int(state["num_drawn"])
        self._ready = torch.empty(0)


class IndependentStream:
    """Batches of ``batch_size`` indices, each drawn uniformly and by itself: with replacement."""

    def __init__(self, num_data: int, batch_size: int, generators: Generators) -> None:
        self.num_data, self.batch_size, self._generators = num_data, batch_size, generators

    def __next__(self) -> Tensor:
        if isinstance(self._generators, torch.Generator):
            return self._drawn(self._generators)
        return torch.stack([self._drawn(generator) for generator in self._generators])

    def _drawn(self, generator: torch.Generator) -> Tensor:
        return torch.randint(self.num_data, (self.batch_size,), generator=generator, device=generator.device)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: it is where its generators are."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`state_dict`."""
