# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Inputs at which few evaluations tell most about how draws differ: where draws of the chain disagree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_apd.distillation.function_space import FunctionSpace, joined
from pyro_apd.distillation.probes import Probes
from pyro_apd.generators.draw_blocks import DrawBlocks

#: Inputs are chosen by how far so many draws of the chain disagree there.
NUM_CHOOSING = 10
# Inputs that are evaluated together: intermediate results of a block of draws take some ten megabytes.
_INPUTS_AT_A_TIME = 250
# Inputs are chosen in proportion to the disagreement, and this share of its mean.
_EVENLY = 0.2
#: Of the inputs of each group, relative numbers.
SHARES = {"rows": 2.0, "near": 1.0, "far": 1.0}


@dataclass(frozen=True)
class ChosenInputs:
    """Inputs at which draws are compared, by group, one after the other.

    :ivar rows: arguments of the model.
    :ivar lengths: inputs of each group.
    :ivar weight_N: such that weighted sums have the expectation of means over all inputs of a group.
    """

    rows: tuple[Tensor, ...]
    lengths: dict[str, int]
    weight_N: Tensor

    @classmethod
    def chosen(
        cls,
        space: FunctionSpace,
        probes: Probes,
        draws: DrawBlocks,
        count: int,
        num_candidates: int,
        shares: Mapping[str, float] = SHARES,
    ) -> ChosenInputs:
        """About ``count`` inputs of so many candidates, most of them where the chain's draws disagree: elsewhere they
        tell little.

        Each of a group's candidates is taken in proportion to the disagreement there, at even distances of the
        cumulative sum, and weighted by the reciprocal of that.

        :param shares: relative numbers of inputs by group; those of other groups are left out.
        """
        groups = {k: rows for k, rows in probes.groups(num_candidates // len(shares)).items() if k in shares}
        every = cls._of(groups)
        views = values_at(space, draws.spaced(min(NUM_CHOOSING, len(draws))), every.rows)
        if not every.rows:
            return cls((), {"rows": len(views[0])}, views[0].new_full((len(views[0]),), 1 / len(views[0])))
        scores = every.by_input(space.disagreements(views).double()).split(list(every.lengths.values()))
        weights, kept = [], {}
        for (name, rows), score_NF in zip(groups.items(), scores, strict=True):
            wanted = max(1, round(count * shares[name] / sum(shares[other] for other in groups)))
            score_N = (score_NF / score_NF.mean(0).clamp_min(1e-30)).nan_to_num(nan=0.0, posinf=0.0).mean(1) + _EVENLY
            total_N = score_N.cumsum(0)
            place_K = (torch.arange(wanted, device=total_N.device) + 0.5) * (total_N[-1] / wanted)
            index_K = torch.searchsorted(total_N, place_K).clamp(max=len(total_N) - 1)
            kept[name] = tuple(value[index_K] for value in rows)
            weights.append((total_N[-1] / (len(total_N) * wanted * score_N[index_K])).to(views[0].dtype))
        return replace(cls._of(kept), weight_N=torch.cat(weights))

    @classmethod
    def _of(cls, groups: dict[str, tuple[Tensor, ...]]) -> ChosenInputs:
        rows = tuple(torch.cat(parts) for parts in zip(*groups.values(), strict=True))
        return cls(rows, {name: len(parts[0]) if parts else 0 for name, parts in groups.items()}, torch.ones(0))

    def by_input(self, values_PF: Tensor) -> Tensor:
        """Values of the outputs of an input side by side, since these may differ in unit: ``(N, F)`` for N inputs."""
        return values_PF.reshape(sum(self.lengths.values()), -1)

    def disagreements(self, space: FunctionSpace, blocks: Iterable[Tensor]) -> dict[str, Tensor]:
        """By group, how far draws disagree on average, ``(F,)``."""
        return self.means(space.disagreements(values_at(space, blocks, self.rows)))

    def means(self, values_PF: Tensor) -> dict[str, Tensor]:
        """Means of positive values by group, ``(F,)``."""
        parts = (self.by_input(values_PF) * self.weight_N.unsqueeze(1)).split(list(self.lengths.values()))
        return {name: part.sum(0).clamp_min(1e-30) for name, part in zip(self.lengths, parts, strict=True)}


def values_at(space: FunctionSpace, blocks: Iterable[Tensor], rows: tuple[Tensor, ...]) -> list[Tensor]:
    """Function values of all draws at all inputs, of which some are evaluated at a time."""
    spans = [slice(i, i + _INPUTS_AT_A_TIME) for i in range(0, len(rows[0]), _INPUTS_AT_A_TIME)] if rows else [slice(0)]

    def at(theta_SD: Tensor) -> list[Tensor]:
        parts = [space.views(theta_SD, tuple(value[span] for value in rows)) for span in spans]
        return [torch.cat(views) for views in zip(*parts, strict=True)]

    return joined(at(theta_SD) for theta_SD in blocks)
