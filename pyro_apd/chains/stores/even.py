# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A store of fixed size for runs of any length: draws evenly spaced over the whole run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyro_apd.chains.stores.base import STATISTICS, MemoryStore
from pyro_apd.models.layout import Layout


class EvenStore(MemoryStore):
    """Keeps every ``stride``-th draw of each chain. When it is full, it drops every second one, and doubles the stride.

    For any length of the run, between half of ``capacity`` and all of it are held, from the first draw to the last.
    Which draws these are depends only on how many there were.

    :param Layout layout: the sites.
    :param int num_chains: chains, ``C``.
    :param int capacity: the largest number of draws per chain, at least 2.
    :param Tensor theta: any state of the chains; its dtype and device are the buffer's.
    :ivar int stride: distance between kept draws.
    """

    def __init__(self, layout: Layout, num_chains: int, capacity: int, theta: Tensor) -> None:
        if capacity < 2:
            raise ValueError(f"capacity={capacity} must be at least 2.")
        super().__init__(layout, num_chains, capacity, theta)
        self.stride = 1

    def write(self, chain: int, draw: int, theta_CD: Tensor, statistics: Mapping[str, Any]) -> None:
        """Keeps a draw if its number is a multiple of the stride."""
        while draw % self.stride == 0 and draw // self.stride >= self.num_draws:
            self._halve()
        if draw % self.stride:
            return
        slot, stop = draw // self.stride, chain + len(theta_CD)
        self._theta_CSD[chain:stop, slot].copy_(theta_CD)
        for name in STATISTICS:
            self._statistics[name][chain:stop, slot] = statistics[name]
        for c in set(range(chain, stop)) - self._ended:
            self._counts[c] = max(self._counts[c], slot + 1)

    def truncate(self, chain: int, count: int) -> None:
        """Removes the draws of a chain from ``count`` on, where all written draws are counted."""
        self._counts[chain] = min(self._counts[chain], -(-count // self.stride))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that :meth:`load_state_dict` takes."""
        return {
            "theta": self._theta_CSD,
            "statistics": self._statistics,
            "counts": list(self._counts),
            "ended": sorted(self._ended),
            "stride": self.stride,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the draws of another store of the same size."""
        self._theta_CSD.copy_(state["theta"])
        for name in STATISTICS:
            self._statistics[name].copy_(state["statistics"][name])
        self._counts = list(state["counts"])
        self._ended = set(state["ended"])
        self.stride = int(state["stride"])

    def _halve(self) -> None:
        """In place, since every draw moves to an earlier slot."""
        for values in (self._theta_CSD, *self._statistics.values()):
            for slot in range(1, (self.num_draws + 1) // 2):
                values[:, slot] = values[:, 2 * slot]
        self._counts = [(count + 1) // 2 for count in self._counts]
        self.stride *= 2
