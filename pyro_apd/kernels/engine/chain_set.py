# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Which chains of a run are computed here: numbers, seeds, rows of the store, and the processes that have the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pyro_apd.runtime.ranks import Ranks
from pyro_apd.runtime.seeds import derived_seed


@dataclass(frozen=True)
class ChainSet:
    """Chains of one run that advance together in this process.

    :ivar int first: number in the run of the first chain.
    :ivar count: number of chains, vectorised, with a state ``(C, D)``; None for a single chain with a state ``(D,)``.
    :ivar total: chains of the whole run, where these are one process's part of a distributed run; else None.
    :ivar first_row: row of the draw store of the first chain; None for its number.
    :ivar Ranks peer_ranks: the processes that have the other chains of the run.
    :ivar data_ranks: the processes that run these same chains, each with some of the data; None where the data are not
        split.
    """

    first: int = 0
    count: int | None = None
    total: int | None = None
    first_row: int | None = None
    peer_ranks: Ranks = field(default_factory=Ranks)
    data_ranks: Ranks | None = None

    @property
    def size(self) -> int:
        """Number of chains here."""
        return self.count or 1

    @property
    def numbers(self) -> range:
        """Numbers of these chains in the run."""
        return range(self.first, self.first + self.size)

    @property
    def num_counted(self) -> int:
        """Chains that count where it is decided whether compiling pays: all of the run that run at once."""
        return self.total or self.size

    @property
    def is_distributed(self) -> bool:
        """Whether these are one process's part of a run, which must not depend on how the run is divided."""
        return self.total is not None

    @property
    def is_whole_run(self) -> bool:
        """Whether no other process has chains of the run."""
        return self.num_counted == self.size

    @property
    def data_rank(self) -> int:
        """Rank among the processes that share the data; 0 where the data are not split."""
        return 0 if self.data_ranks is None else self.data_ranks.rank

    def store_row(self, number: int) -> int:
        """Row of the draw store of the chain with this number."""
        return number if self.first_row is None else number - self.first + self.first_row

    def seeds(self, run_seed: int) -> list[int]:
        """A seed per chain: it depends on the seed of the run and the number of the chain alone."""
        return [derived_seed(run_seed, "chain", number) for number in self.numbers]

    def select(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values of these chains, ``(C, ...)`` or for a single chain ``(...)``, from those of all of the run."""
        index = self.first if self.count is None else slice(self.first, self.first + self.count)
        return {name: value[index] for name, value in params.items()}

    def same_on_data_ranks(self, value: Any) -> Any:
        """``value`` as the first of the processes that share the data has it.

        :raises RankError: if another process is gone.
        """
        return value if self.data_ranks is None else self.data_ranks.broadcast_object(value)
