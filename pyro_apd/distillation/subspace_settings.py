# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Which settings of the default generator suit the draws of a chain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_apd.distillation.layer_inputs import LayerInputs
from pyro_apd.generators.draw_blocks import DrawBlocks
from pyro_apd.generators.subspace_fit import SubspaceFit, SubspaceSettings

# Coordinates of all chains together, and of one at least; numbers of a draw and draws per coordinate.
_RANK, _MIN_RANK, _NUMBERS_PER_COORDINATE, _DRAWS_PER_COORDINATE = 96, 12, 10, 1.5
# With budgets below this share of what the default takes there are fewer, so that steps are finer.
_SMALLER_RANK, _FEWER_BELOW = 32, 0.9
# With larger budgets there are up to so many times as many: of more, the modes have too large a variance.
_MOST_TIMES = 1.7
# Networks with fewer numbers take few bytes in any case. They have at least so many coordinates per chain.
_TINY, _TINY_RANK, _TINY_NUMBERS_PER_COORDINATE = 2000, 48, 9
# A mode is a mean of draws that are close to each other, since the mean of independent networks is a bad network: this
# share of the length of correlation.
_SHARE_OF_CORRELATION = 1 / 8
# Steps that are coarser than this cost more than half of the coordinates do. Of networks of 400 to 4,000 weights,
# within a factor of about two of the best number of coordinates at budgets of 0.7 to 6 networks.
_COARSE_STEP = 2.5e-3
# Few draws, in all, and of tiny networks. Errors of rounding add up over coordinates, so that steps are this one
# divided by the square root of their number.
_FEW, _FEW_OF_TINY, _STEP_OF_FEW = 100, 200, 2e-3
# Where modes of all draws take this share of a network's bytes at most, as of some hundred thousand weights on, each
# draw is one: what large networks predict changes within a few draws. With coarser steps than those of _FINER, such
# draws disagree too much, and a spread around means of draws can be made smaller.
_FREE_MODES = 0.05
# Budget relative to what the default takes, from which on settings are finer.
_FINER = 2.2
# Of so many chains, whose bytes add up, steps are coarser by a factor.
_SEVERAL, _COARSER = 4, 1.5
# Entries by which the length is estimated.
_NUM_ENTRIES = 512
# Where coordinates follow functions, they are more, and each draw is a mode. Null parts are coarser, and without noise:
# a third of the bytes went there.
_STIFF_RANK = 280
_STIFF_SETTINGS: dict[str, Any] = {"null_step": 1.0, "is_dithered": True, "has_null_noise": False}


@dataclass(frozen=True)
class Case:
    """Draws to fit, and which settings suit them.

    :ivar functions_CTF: what draws predict, where coordinates follow that; else None.
    :ivar rank: as the user wants it; else None.
    :ivar float length: over how many draws entries are correlated.
    """

    draws: DrawBlocks
    inputs: Sequence[LayerInputs]
    functions_CTF: Tensor | None
    rank: int | None
    length: float

    def fit(self, settings: SubspaceSettings) -> SubspaceFit:
        """Reads the draws."""
        return self._fit_all(settings)

    def _fit_all(self, settings: SubspaceSettings) -> SubspaceFit:
        matrices, moments = [one.matrix for one in self.inputs], [one.moment_II for one in self.inputs]
        fit = SubspaceFit(self.draws, matrices, moments, settings, self.functions_CTF)
        fit.read()
        return fit

    def settings(self, share: float) -> SubspaceSettings:
        """For a budget relative to what the default takes."""
        chosen = settings_for(share, self._rank(share))
        return chosen if self.functions_CTF is None else replace(chosen, **_STIFF_SETTINGS)

    def default_settings(self) -> SubspaceSettings:
        """Where there is no budget."""
        settings = self.settings(1.0)
        step = settings.step * (_COARSER if self.draws.shape[0] >= _SEVERAL else 1.0)
        return replace(settings, segment_length=self.segment_length(1.0), step=step)

    def segment_length(self, share: float) -> int:
        """Draws that make a mode at least, with a budget relative to what the default takes."""
        settings = self.settings(1.0)
        if share >= _FINER and self._has_free_modes(settings):
            return 1
        length = self.length if self.functions_CTF is None else 0.0
        return max(1, min(settings.segment_length, round(_SHARE_OF_CORRELATION * length)))

    def segment_within(self, num_bytes: float, settings: SubspaceSettings, shortest: int) -> int:
        """The same where modes may take so many bytes."""
        num_chains, num_draws, _ = self.draws.shape
        return max(shortest, min(math.ceil(num_chains * num_draws * settings.rank / num_bytes), num_draws))

    def coarse_step(self, settings: SubspaceSettings) -> float:
        """Steps that are coarser cost more than half of the coordinates do."""
        return _COARSE_STEP

    @property
    def scales_modes(self) -> bool:
        """Where each draw is a mode: whether what coordinates leave out matters more than noise."""
        return self.functions_CTF is not None or self._has_free_modes(self.settings(1.0))

    def _has_free_modes(self, settings: SubspaceSettings) -> bool:
        return len(self.draws) * settings.rank * 2 <= _FREE_MODES * 4 * self.draws.shape[2]

    def _rank(self, share: float) -> int:
        """Coordinates of a chain."""
        num_chains, num_draws, size = self.draws.shape
        if self.functions_CTF is not None and self.rank is None:
            of_chain = max(_MIN_RANK, _STIFF_RANK // num_chains)
            return max(1, min(of_chain, num_draws - 1, size))
        wanted = self._usual_rank(share) if self.rank is None else self.rank
        return max(1, min(wanted, int(num_draws / _DRAWS_PER_COORDINATE), size))

    def _usual_rank(self, share: float) -> int:
        num_chains, _, size = self.draws.shape
        largest = _RANK * min(max(1.0, share / 2), _MOST_TIMES)
        if share < _FEWER_BELOW:
            largest = _SMALLER_RANK
        least = _MIN_RANK
        if size < _TINY:
            least = max(_MIN_RANK, min(_TINY_RANK, size // _TINY_NUMBERS_PER_COORDINATE))
        return max(least, min(int(largest), size // _NUMBERS_PER_COORDINATE) // num_chains)


@dataclass(frozen=True)
class FewDraws(Case):
    """The same with one draw more than there are coordinates, evenly spaced, of which nothing is left out.

    Draws of a chain that mixes well have no subspace in common. What the coordinates of all draws leave out then makes
    predictions disagree too much, whatever the noise.

    :ivar float finer: steps relative to the usual ones.
    """

    finer: float = 1.0

    def fit(self, settings: SubspaceSettings) -> SubspaceFit:
        """Reads the draws that are taken."""
        return replace(self, draws=self.draws.thinned(settings.rank + 1))._fit_all(settings)

    def settings(self, share: float) -> SubspaceSettings:
        """See :meth:`Case.settings`; bytes grow with the number of draws."""
        num_chains, num_draws, size = self.draws.shape
        count = (_FEW_OF_TINY if size < _TINY else _FEW) // num_chains
        wanted = max(_MIN_RANK, count - 1) if self.rank is None else self.rank
        rank = max(1, min(round(wanted * share) if self.rank is None else wanted, num_draws - 1, size))
        settings = settings_for(1.0, rank)
        return replace(
            settings,
            step=self.finer * _STEP_OF_FEW / math.sqrt(rank),
            path_rank=min(settings.path_rank, rank),
            segment_length=1,
        )

    def default_settings(self) -> SubspaceSettings:
        """See :meth:`Case.default_settings`."""
        return self.settings(1.0)

    def segment_length(self, share: float) -> int:
        """Each draw is a mode."""
        return 1

    def segment_within(self, num_bytes: float, settings: SubspaceSettings, shortest: int) -> int:
        """Likewise, as the number of modes falls with that of coordinates."""
        return shortest

    def coarse_step(self, settings: SubspaceSettings) -> float:
        """See :meth:`Case.coarse_step`."""
        return 2 * _STEP_OF_FEW / math.sqrt(settings.rank)

    @property
    def scales_modes(self) -> bool:
        """Nothing is left out."""
        return False


def correlation_length(draws: DrawBlocks) -> float:
    """Number of draws over which the entries of a chain are correlated, of an exponential decay: -1 / log of the
    correlation of successive draws, averaged over entries."""
    num_chains, num_draws, size = draws.shape
    if num_draws < 3:
        return 0.0
    entry_E = torch.linspace(0, size - 1, min(size, _NUM_ENTRIES), dtype=torch.float64).round().long().to(draws.device)
    values_SE = torch.cat([block_SD[:, entry_E] for block_SD in draws.rows()]).double()
    values_CTE = values_SE.unflatten(0, (num_chains, num_draws))
    values_CTE = values_CTE - values_CTE.mean(1, keepdim=True)
    square_CE = values_CTE.square().mean(1)
    product_CE = (values_CTE[:, 1:] * values_CTE[:, :-1]).mean(1)
    correlation = float((product_CE / square_CE.clamp_min(1e-300)).mean())
    return -1 / math.log(min(max(correlation, 1e-3), 0.9999))


def settings_for(share: float, rank: int) -> SubspaceSettings:
    """Settings for a budget relative to what the default takes.

    Chosen on validation rows of MNIST and on digits, see "Distillation" in ``benchmarks/RESULTS.md``.
    """
    if share < 0.8:
        return SubspaceSettings(pinned=64, rank=rank, path_rank=4, step=1.2e-3, null_step=0.6)
    if share < _FINER:
        return SubspaceSettings(rank=rank)
    return SubspaceSettings(pinned=128, rank=rank, path_rank=12, null_step=0.2)
