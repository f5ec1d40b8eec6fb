# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The draws of one or more chains, and which chains of their run are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChainDraws:
    """All draws of one or more chains.

    :ivar dict values: constrained values ``(C, S, ...)`` by site.
    :ivar str name: the kernel's name, such as ``SGLD``; for legends.
    :ivar tuple missing: numbers of the chains of the run that are not among these.
    :ivar tuple diverged: numbers of the chains that diverged; what they drew from there on is not among these.
    """

    values: dict[str, Tensor]
    name: str = "chain"
    missing: tuple[int, ...] = ()
    diverged: tuple[int, ...] = ()

    @property
    def num_chains(self) -> int:
        """Chains, ``C``."""
        return next(iter(self.values.values())).shape[0]

    @property
    def num_draws(self) -> int:
        """Draws per chain, ``S``."""
        return next(iter(self.values.values())).shape[1]

    @property
    def device(self) -> torch.device:
        """Where the draws are."""
        return next(iter(self.values.values())).device

    @property
    def num_bytes(self) -> int:
        """Size of all draws as tensors."""
        return sum(value.numel() * value.element_size() for value in self.values.values())

    @property
    def bytes_per_draw(self) -> int:
        """Size of one network."""
        return self.num_bytes // (self.num_chains * self.num_draws)

    def pooled(self, steps_M: Sequence[int]) -> dict[str, Tensor]:
        """Draws at the given steps of every chain, chain after chain, ``(C M, ...)`` by site."""
        index = torch.as_tensor(steps_M, dtype=torch.long)
        return {name: value[:, index.to(value.device)].flatten(0, 1) for name, value in self.values.items()}

    def at(self, chains_M: Sequence[int], steps_M: Sequence[int]) -> dict[str, Tensor]:
        """Draws at pairs of chain and step, ``(M, ...)`` by site."""
        chains = torch.as_tensor(chains_M, device=self.device)
        steps = torch.as_tensor(steps_M, device=self.device)
        return {name: value[chains, steps] for name, value in self.values.items()}

    def remarks(self) -> list[str]:
        """What a reader of results must know of chains that are missing or shorter than asked for."""
        return chain_remarks(self.missing, self.diverged)


def chain_remarks(missing: Sequence[int], diverged: Sequence[int]) -> list[str]:
    """Sentences about the chains of a run that are missing, and those that diverged, by their numbers."""
    lost = [chain for chain in missing if chain in diverged]
    unfinished = [chain for chain in missing if chain not in diverged]
    cut = [chain for chain in diverged if chain not in missing]
    found = []
    if lost:
        found.append(f"Chains {lost} diverged, and are missing.")
    if unfinished:
        found.append(f"Chains {unfinished} stopped before the others, and are missing.")
    if cut:
        found.append(f"Chains {cut} diverged; of all chains only the draws from before that are here.")
    return found
