# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The default generator for a distillation: which matrices it takes, its settings, and how many bytes it has."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pyro_apd.distillation.byte_budget import LastFit, num_bytes_accepted, within_budget
from pyro_apd.distillation.calibration import Calibration, calibrate
from pyro_apd.distillation.chosen_inputs import ChosenInputs, values_at
from pyro_apd.distillation.function_space import FunctionSpace
from pyro_apd.distillation.layer_inputs import LayerInputs, layer_inputs
from pyro_apd.distillation.options import DistillOptions
from pyro_apd.distillation.probes import Probes
from pyro_apd.generators import precision
from pyro_apd.generators.draw_blocks import DrawBlocks
from pyro_apd.generators.subspace import SubspaceGenerator
from pyro_apd.generators.subspace_fit import SubspaceFit, SubspaceSettings
from pyro_apd.generators.weight_matrices import WeightMatrix
from pyro_apd.models.frozen import FrozenTensors
from pyro_apd.models.layout import Layout
from pyro_apd.posterior import integers
from pyro_apd.runtime.memory import give_back_freed
from pyro_apd.runtime.stages import unseen

# Coordinates of all chains together, and of one at least; numbers of a draw and draws per coordinate.
_RANK, _MIN_RANK, _NUMBERS_PER_COORDINATE, _DRAWS_PER_COORDINATE = 96, 12, 10, 1.5
# With budgets below this share of what the default takes there are fewer, so that steps are finer.
_SMALLER_RANK, _FEWER_BELOW = 32, 0.9
# With larger budgets there are up to so many times as many: of more, the modes have too large a variance.
_MOST_TIMES = 1.7
# Networks with fewer numbers take few bytes in any case. They have at least so many coordinates per chain: more where
# draws are nearly independent, which take a path in fewer dimensions no more.
_TINY, _TINY_RANK, _TINY_MIXED_RANK, _TINY_NUMBERS_PER_COORDINATE = 2000, 48, 100, 9
# Draws that are correlated over fewer draws than this are nearly independent. A mode is a mean of draws that are close
# to each other, since the mean of independent networks is a bad network: this share of the length of correlation.
_MIXED, _SHARE_OF_CORRELATION = 10.0, 1 / 8
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
# Chains with fewer draws than this are fitted as one. Of more draws than this per chain some are taken, evenly spaced,
# since the cost grows with their square.
_MIN_DRAWS, _MAX_DRAWS = 20, 1024
# Where each weight, frozen ones included, is used so often for one input, as in convolutions, functions change within a
# few draws by directions in which weights hardly vary. Coordinates then follow functions, too: at inputs of so many
# multiplications for all draws; they are more, and each draw is a mode. Null parts are coarser, and without noise: a
# third of the bytes went there.
_MANY_USES, _STIFF_RANK, _PRODUCTS, _FEWEST_INPUTS, _MOST_INPUTS = 20, 280, 1_000_000_000_000, 20, 200
_STIFF_SETTINGS: dict[str, Any] = {"null_step": 1.0, "is_dithered": True, "has_null_noise": False}
# Sites with fewer rows or columns are numbers like any other.
_MIN_SIDE = 4
# Draws under which inputs of layers are gathered, and rows of the data.
_NUM_DRAWS, _NUM_ROWS = 4, 1024
# Bytes of a file beside its tensors: what of its description does not depend on the network, and what each tensor takes
# in the header.
_DESCRIPTION_BYTES, _TENSOR_BYTES = 2000, 80


@dataclass(frozen=True)
class FittedSubspace:
    """A generator, and how it was calibrated.

    :ivar calibration: None where functions are not known.
    :ivar default_bytes: what the default without a budget takes, where the budget is smaller.
    :ivar callable default: fits that default and calibrates it.
    """

    generator: SubspaceGenerator
    calibration: Calibration | None
    default_bytes: int | None = None
    default: Callable[[], FittedSubspace] | None = None


def fit_default(
    layout: Layout,
    draws: DrawBlocks,
    functions: tuple[FunctionSpace, Probes] | None,
    options: DistillOptions,
    num_products: int,
    frozen: FrozenTensors | None = None,
    note: Callable[[str], None] = unseen,
) -> FittedSubspace:
    """Fits the generator to draws, within a budget where there is one, and calibrates it.

    :param functions: how draws are compared as functions; None where that is not known.
    :param int num_products: multiplications of a network per input.
    :param FrozenTensors frozen: those of the model, of which the file holds digests.
    :param callable note: is told what is being done.
    """
    note("inputs of the layers")
    seen = {} if functions is None else _seen_inputs(layout, draws, functions)
    if draws.shape[1] < _MIN_DRAWS and draws.shape[0] > 1:
        draws = draws.pooled()
    draws = draws.thinned(_MAX_DRAWS)
    _, _, size = draws.shape
    budget = num_bytes_accepted(options.byte_budget, size, draws.dtype)
    size_of = partial(num_bytes, layout=layout, dtype=options.file_dtype(draws.dtype), frozen=frozen)
    length = correlation_length(draws)
    found = _matrices(layout, seen, draws)

    # What all data together take says nothing about the uses of a weight.
    num_weights = size + (0 if frozen is None else sum(value.numel() for value in frozen.values.values()))
    is_stiff = functions is not None and functions[1].has_rows and num_products > _MANY_USES * num_weights
    functions_CTF = _functions(functions, draws, num_products) if functions is not None and is_stiff else None
    case = _Case(draws, found, functions_CTF, options.rank, length)

    def fitted() -> tuple[SubspaceGenerator, int | None]:
        """The generator, and the bytes of the default where there is a budget; what the fit held is freed."""
        note("two passes over the draws")
        fits = LastFit(case.fit)
        generator = fits.at(settings).generator(is_last=budget is None)
        if budget is None:
            return generator, None
        default_bytes = size_of(generator)
        del generator
        share = budget / default_bytes
        shortest = case.segment_length(share)
        note(f"steps for {budget:,.0f} bytes")
        keeps_rank = options.rank is not None
        return within_budget(budget, fits, shortest, case.settings(share), draws, size_of, keeps_rank), default_bytes

    def calibrated(generator: SubspaceGenerator) -> FittedSubspace:
        give_back_freed()
        note("spread and noise")
        calibration = None
        if functions is not None:
            calibration = calibrate(generator, functions, draws, num_products, case.scales_modes)
        return FittedSubspace(generator, calibration)

    def default() -> FittedSubspace:
        """Fitted again, since generators of one fit share their tensors."""
        return calibrated(case.fit(settings).generator(is_last=True))

    settings = case.default_settings()
    generator, default_bytes = fitted()
    result = calibrated(generator)
    if budget is None or default_bytes is None or budget >= default_bytes:
        return result
    return replace(result, default_bytes=default_bytes, default=default)


@dataclass(frozen=True)
class _Case:
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
            least = min(_TINY_RANK, size // _TINY_NUMBERS_PER_COORDINATE)
            least = _TINY_MIXED_RANK if self.length < _MIXED else max(_MIN_RANK, least)
        return max(least, min(int(largest), size // _NUMBERS_PER_COORDINATE) // num_chains)


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


def num_bytes(
    generator: SubspaceGenerator,
    layout: Layout,
    dtype: str = "int8",
    frozen: FrozenTensors | None = None,
    always_coded: bool = False,
) -> int:
    """Size of the file of a generator of these sites in a precision, within a few per cent.

    :param bool always_coded: see :func:`~pyro_apd.posterior.integers.packed_sizes`.
    """
    tensors = {name: value.detach() for name, value in generator.state_dict().items()}
    found = integers.packed_sizes(tensors, precision.encode(tensors, dtype), always_coded)
    # The header holds the description as a string of JSON, with quotes escaped. Sites and matrices may be hundreds.
    parts = [layout.to_json(), generator.config, {} if frozen is None else frozen.to_json()]
    description = json.dumps(json.dumps(parts))
    return sum(found) + _TENSOR_BYTES * len(found) + len(description) + _DESCRIPTION_BYTES


@torch.no_grad()
def _functions(functions: tuple[FunctionSpace, Probes], draws: DrawBlocks, num_products: int) -> Tensor:
    """What draws predict ``(C, T, F)`` at inputs where they disagree, with torch's global random numbers."""
    space, probes = functions
    wanted = _PRODUCTS // (num_products * len(draws))
    count = max(_FEWEST_INPUTS, min(_MOST_INPUTS, wanted))
    chosen = ChosenInputs.chosen(space, probes, draws, count, 4 * count)
    values_PSF = values_at(space, draws.rows(), chosen.rows)[-1]
    num_chains, num_draws, _ = draws.shape
    return values_PSF.transpose(0, 1).reshape(num_chains, num_draws, -1)


def _seen_inputs(
    layout: Layout, draws: DrawBlocks, functions: tuple[FunctionSpace, Probes]
) -> Mapping[str, LayerInputs]:
    space, probes = functions
    inputs = probes.groups(_NUM_ROWS)["rows"]
    theta_SD = chain.from_iterable(draws.spaced(min(_NUM_DRAWS, len(draws))))
    return layer_inputs(space.model, layout, theta_SD, inputs)


def _matrices(layout: Layout, seen: Mapping[str, LayerInputs], draws: DrawBlocks) -> list[LayerInputs]:
    """Matrices of weights with second moments of their inputs: as seen, else as the draws show them."""
    found = []
    for site in layout:
        shape = site.unconstrained_shape
        if site.name in seen:
            found.append(seen[site.name])
        elif len(shape) >= 2 and shape[0] >= _MIN_SIDE and site.size // shape[0] >= _MIN_SIDE:
            matrix = WeightMatrix(site.start, shape[0], site.size // shape[0])
            found.append(LayerInputs(matrix, _precision(matrix, draws)))
    return found


def _precision(matrix: WeightMatrix, draws: DrawBlocks) -> Tensor:
    """Inverse covariance ``(I, I)`` of the rows of a matrix, in place of the second moment of its inputs.

    Data determine the weights in directions in which inputs are large: there all units vary little.
    """
    covariance_II = torch.zeros(matrix.inputs, matrix.inputs, dtype=torch.float64, device=draws.device)
    length = max(1, draws.width // matrix.inputs)
    for start in range(0, matrix.units, length):
        rows = slice(start, min(start + length, matrix.units))
        for _, values_SW in draws.columns(matrix.row_spans(rows)):
            rows_SOI = matrix.gather(values_SW, None)
            rows_SOI = (rows_SOI - rows_SOI.mean(0)).flatten(0, 1).double()
            covariance_II += rows_SOI.mT @ rows_SOI
    mean = covariance_II.diagonal().mean().clamp_min(1e-300)
    ridge_II = 1e-3 * torch.eye(matrix.inputs, dtype=torch.float64, device=draws.device)
    precision_II: Tensor = torch.linalg.inv(covariance_II / mean + ridge_II)
    return precision_II
