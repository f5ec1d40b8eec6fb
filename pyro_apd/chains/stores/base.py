# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Stores of draws, for a running chain and afterwards.

A store is one flat buffer ``theta_CSD`` of unconstrained draws by chain, allocated once at its full size, and three
statistics per draw. Draws of real sites are views of it; those of others are constrained once, in blocks. Here the
buffer is in memory; :mod:`pyro_apd.chains.stores.disk` keeps it in files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.infer.mcmc.util import select_samples
from torch import Tensor
from torch.distributions import Transform

from pyro_apd.models.frozen import FrozenTensors
from pyro_apd.models.layout import Layout

#: Statistics that are kept with every draw.
STATISTICS = ("potential", "grad_norm", "step_size")

# Bytes of a block of draws, which are constrained, copied or checked together.
_BLOCK_BYTES = 16 * 2**20


class DrawStore(ABC):
    """Draws of one run.

    :ivar Layout layout: the sites that are kept, in order of the columns of ``theta_CSD``.
    :ivar int num_chains: chains, ``C``.
    :ivar int num_draws: draws per chain when the run is complete, ``S``.
    :ivar dict info: notes of the run, anything that JSON holds.
    """

    def __init__(self, layout: Layout, num_chains: int, num_draws: int) -> None:
        self.layout = layout
        self.num_chains = num_chains
        self.num_draws = num_draws
        self.info: dict[str, Any] = {}
        self._ended: set[int] = set()

    @property
    def frozen(self) -> FrozenTensors | None:
        """Frozen parameters and buffers of the model that was sampled; None where they are not known.

        :raises ValueError: if the notes of a file are malformed.
        """
        return FrozenTensors.from_json(self.info["frozen"]) if "frozen" in self.info else None

    @property
    @abstractmethod
    def counts(self) -> list[int]:
        """Number of draws so far, by chain."""

    @property
    @abstractmethod
    def theta_CSD(self) -> Tensor:
        """All draws, unconstrained; entries of draws still to come are undefined."""

    @property
    @abstractmethod
    def statistics(self) -> dict[str, Tensor]:
        """``potential``, ``grad_norm`` and ``step_size`` of every draw, ``(C, S)`` each."""

    @abstractmethod
    def write(self, chain: int, draw: int, theta_CD: Tensor, statistics: Mapping[str, Any]) -> None:
        """Stores a draw of the chains from ``chain`` on; columns as in :attr:`layout`."""

    @abstractmethod
    def truncate(self, chain: int, count: int) -> None:
        """Removes the draws of a chain from ``count`` on."""

    @abstractmethod
    def flush(self, durably: bool = False) -> None:
        """Makes all draws visible to other processes; with ``durably``, they also survive a power cut."""

    @abstractmethod
    def _buffer(self, size: int) -> Tensor:
        """A buffer for constrained values ``(C, S, size)``, filled by :meth:`_fill`."""

    def _fill(self, buffer: Tensor, chain: int, start: int, values: Tensor) -> None:
        buffer[chain, start : start + len(values)] = values

    def _filled(self, buffer: Tensor) -> Tensor:
        return buffer

    def end(self, chain: int, count: int) -> None:
        """Ends a chain that diverged: removes its draws from ``count`` on, and keeps none that are written later.

        Vectorised chains are written together, so that the state of a chain that stopped is written as well.
        """
        self.truncate(chain, count)
        self._ended.add(chain)

    def complete_part(self) -> tuple[list[int], int]:
        """Chains and number of draws of the largest block without gaps: all draws of a complete run."""
        return largest_block(self.counts)

    @property
    def missing_chains(self) -> list[int]:
        """Chains of which the complete part has no draws: they diverged, or were not finished."""
        kept = self.complete_part()[0]
        return [chain for chain in range(self.num_chains) if chain not in kept]

    def blocks(self, num_draws: int | None = None) -> list[tuple[int, int]]:
        """Spans of draws that are processed together; each takes at most some 16 MB per chain."""
        num_draws = self.num_draws if num_draws is None else num_draws
        width = max(1, self.layout.size) * max(4, self.theta_CSD.element_size())
        length = max(1, _BLOCK_BYTES // width)
        return [(start, min(start + length, num_draws)) for start in range(0, num_draws, length)]

    def unconstrained(self) -> Tensor:
        """Draws of the complete part ``(C, S, D)``; a view, unless chains in between are left out."""
        chains, num_draws = self.complete_part()
        return _rows(self.theta_CSD, chains)[:, :num_draws]

    def samples(self, transforms: Mapping[str, Transform] | None = None) -> dict[str, Tensor]:
        """Draws of the complete part by site, ``(C, S, ...)``, constrained; names sorted, as Pyro's are.

        Real sites are views of :attr:`theta_CSD`.

        :param transforms: to unconstrained space, by site; sites without one stay unconstrained. Default the layout's.
        """
        chains, num_draws = self.complete_part()
        values = self.layout.split(self.unconstrained())
        if transforms is None:
            transforms = {site.name: site.transform.inv for site in self.layout if not site.is_real}
        changed = [name for name in self.layout.names if name in transforms and not _is_identity(transforms[name])]
        if changed and num_draws:
            values.update(self._constrained(chains, num_draws, {name: transforms[name].inv for name in changed}))
        elif changed:
            values.update({name: transforms[name].inv(values[name]) for name in changed})
        return {name: values[name] for name in sorted(values)}

    def _constrained(self, chains: list[int], num_draws: int, maps: Mapping[str, Transform]) -> dict[str, Tensor]:
        """Values of some sites ``(C, S, ...)``, computed in blocks, as columns of one buffer."""

        def values_of(chain: int, start: int, stop: int) -> dict[str, Tensor]:
            theta = self.layout.split(self.theta_CSD[chain, start:stop])
            return {name: transform(theta[name]) for name, transform in maps.items()}

        shapes = {name: value.shape[1:] for name, value in values_of(chains[0], 0, 1).items()}
        buffer = self._buffer(sum(shape.numel() for shape in shapes.values()))
        for chain in chains:
            for start, stop in self.blocks(num_draws):
                values = values_of(chain, start, stop).values()
                columns = [value.flatten(1) if value.dim() > 1 else value[:, None] for value in values]
                self._fill(buffer, chain, start, torch.cat(columns, 1))
        buffer = _rows(self._filled(buffer), chains)[:, :num_draws]
        parts = buffer.split([shape.numel() for shape in shapes.values()], -1)
        return {
            name: part.reshape(*part.shape[:2], *shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def get_samples(self, num_samples: int | None = None, group_by_chain: bool = False) -> dict[str, Tensor]:
        """Draws as :meth:`pyro.infer.MCMC.get_samples` gives them, so that a store can stand in for a run."""
        return dict(select_samples(self.samples(), num_samples, group_by_chain))


class MemoryStore(DrawStore):
    """Draws in one tensor on the chains' device.

    :param theta: any state of the chains; its dtype and device are the buffer's.
    """

    def __init__(self, layout: Layout, num_chains: int, num_draws: int, theta: Tensor) -> None:
        super().__init__(layout, num_chains, num_draws)
        # Not filled, so that the system provides memory only as draws come.
        self._theta_CSD = theta.new_empty((num_chains, num_draws, layout.size))
        self._statistics = {name: self._theta_CSD.new_full((num_chains, num_draws), torch.nan) for name in STATISTICS}
        self._counts = [0] * num_chains

    @classmethod
    def of(cls, store: DrawStore, device: torch.device | str) -> MemoryStore:
        """The draws of another store, copied into memory in blocks."""
        copy = cls(store.layout, store.num_chains, store.num_draws, store.theta_CSD.new_empty(0, device=device))
        copy._counts, copy.info = list(store.counts), store.info
        for chain, count in enumerate(copy._counts):
            for start, stop in store.blocks(count):
                copy._theta_CSD[chain, start:stop] = store.theta_CSD[chain, start:stop].to(device)
        for name, values in store.statistics.items():
            copy._statistics[name].copy_(values)
        return copy

    @classmethod
    def adopting(cls, store: DrawStore, rows: range | None = None) -> MemoryStore:
        """The tensors of another store, or of some of its chains, without a copy. The other store may be deleted."""
        part = slice(None) if rows is None else slice(rows.start, rows.stop)
        theta_CSD = store.theta_CSD[part]
        counts = list(store.counts)[part]
        adopted = cls(store.layout, len(counts), 0, theta_CSD.new_empty(0))
        adopted.num_draws = store.num_draws
        adopted._counts, adopted.info = counts, store.info
        adopted._theta_CSD = theta_CSD
        adopted._statistics = {name: values[part] for name, values in store.statistics.items()}
        return adopted

    @property
    def counts(self) -> list[int]:
        """Number of draws so far, by chain."""
        return self._counts

    @property
    def theta_CSD(self) -> Tensor:
        """All draws, unconstrained."""
        return self._theta_CSD

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Statistics of every draw, ``(C, S)`` each, on the draws' device."""
        return self._statistics

    def write(self, chain: int, draw: int, theta_CD: Tensor, statistics: Mapping[str, Any]) -> None:
        """Copies, without waiting for the device."""
        stop = chain + len(theta_CD)
        self._theta_CSD[chain:stop, draw].copy_(theta_CD)
        for name in STATISTICS:
            self._statistics[name][chain:stop, draw] = statistics[name]
        for c in set(range(chain, stop)) - self._ended:
            self._counts[c] = max(self._counts[c], draw + 1)

    def truncate(self, chain: int, count: int) -> None:
        """Removes the draws of a chain from ``count`` on."""
        self._counts[chain] = min(self._counts[chain], count)

    def flush(self, durably: bool = False) -> None:
        """Nothing to do."""

    def _buffer(self, size: int) -> Tensor:
        return self._theta_CSD.new_empty((self.num_chains, self.num_draws, size))


def largest_block(counts: Sequence[int]) -> tuple[list[int], int]:
    """The chains, and the number of their draws, that make the largest block; ``counts`` are draws by chain.

    All chains, and no draws, where there are no draws.
    """
    by_count = sorted(range(len(counts)), key=lambda c: (-counts[c], c))
    sizes = [(k + 1) * counts[c] for k, c in enumerate(by_count)]
    if not any(sizes):
        return list(range(len(counts))), 0
    best = max(range(len(sizes)), key=lambda k: (sizes[k], k))
    return sorted(by_count[: best + 1]), counts[by_count[best]]


def kept_layout(layout: Layout, names: Sequence[str] | None) -> Layout:
    """The part of a layout that ``save_params`` names.

    :raises ValueError: if one of them is not a site.
    """
    if names is None:
        return layout
    missing = [name for name in names if name not in layout.names]
    if missing:
        raise ValueError(f"save_params has {missing}, which are not latent sites; the model has {list(layout.names)}.")
    sites = [site for site in layout if site.name in set(names)]
    return Layout({site.name: site.shape for site in sites}, {site.name: site.support for site in sites})


def kept_columns(layout: Layout, kept: Layout, theta_CD: Tensor) -> Tensor:
    """The columns of ``theta_CD`` that belong to kept sites; the same tensor where all are kept."""
    if kept.size == layout.size:
        return theta_CD
    parts = [theta_CD[:, site.start : site.stop] for site in layout if site.name in kept.names]
    return torch.cat(parts, 1) if parts else theta_CD[:, :0]


def _rows(values: Tensor, chains: list[int]) -> Tensor:
    """Some chains of ``(C, S, ...)``; a view where they are contiguous."""
    first, last = chains[0], chains[-1]
    return values[first : last + 1] if last - first + 1 == len(chains) else values[chains]


def _is_identity(transform: Transform) -> bool:
    inverse = transform.inv
    while hasattr(inverse, "base_transform"):
        inverse = inverse.base_transform
    return isinstance(inverse, torch.distributions.transforms.ComposeTransform) and not inverse.parts


def as_bytes(values: Tensor) -> memoryview:
    """The numbers of a tensor as bytes on the host, without a copy where they are contiguous there."""
    values = values.detach().cpu().contiguous()
    return values.reshape(-1).view(torch.uint8).numpy().data
