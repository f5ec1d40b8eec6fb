# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The default generator for a distillation: which matrices it takes, its settings, and how many bytes it has."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from pyro_apd.distillation.byte_budget import BudgetError, LastFit, num_bytes_accepted, within_budget
from pyro_apd.distillation.calibration import Calibration, calibrate
from pyro_apd.distillation.chosen_inputs import ChosenInputs, values_at
from pyro_apd.distillation.function_space import FunctionSpace
from pyro_apd.distillation.layer_inputs import LayerInputs, layer_inputs
from pyro_apd.distillation.options import DistillOptions
from pyro_apd.distillation.probes import Probes
from pyro_apd.distillation.subspace_settings import Case, FewDraws, correlation_length
from pyro_apd.generators import precision
from pyro_apd.generators.draw_blocks import DrawBlocks
from pyro_apd.generators.subspace import SubspaceGenerator
from pyro_apd.generators.weight_matrices import WeightMatrix
from pyro_apd.models.frozen import FrozenTensors
from pyro_apd.models.layout import Layout
from pyro_apd.posterior import integers
from pyro_apd.runtime.memory import give_back_freed
from pyro_apd.runtime.stages import unseen

# Chains with fewer draws than this are fitted as one. Of more draws than this per chain some are taken, evenly spaced,
# since the cost grows with their square.
_MIN_DRAWS, _MAX_DRAWS = 20, 1024
# Where each weight, frozen ones included, is used so often for one input, as in convolutions, functions change within a
# few draws by directions in which weights hardly vary. Coordinates then follow functions, too: at inputs of so many
# multiplications for all draws.
_MANY_USES, _PRODUCTS, _FEWEST_INPUTS, _MOST_INPUTS = 20, 1_000_000_000_000, 20, 200
# From this ratio of disagreements on the data to the chain's on, or its inverse, fewer draws are tried. Errors of these
# are larger by this, divided by their number. Steps that are tried, relative to the usual ones.
_ACCEPTED_RATIO, _LACK, _FINER = 1.1, 2.0, (1.0, 0.3, 0.1)
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

    @property
    def num_distinct(self) -> int | None:
        """How many draws there are up to noise, where there is no spread around modes; else None."""
        found = self.generator
        return None if bool(found.spread.any()) else found.num_chains * found.num_modes


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
    case = Case(draws, found, functions_CTF, options.rank, length)
    fitting = _Fitting(case, functions, num_products, budget, options.rank is not None, size_of, note)
    result = fitting.run()
    _, num_draws, size = draws.shape
    if is_stiff or _is_accepted(result) or result.generator.rank >= min(size, num_draws - 1):
        return result
    with suppress(BudgetError):
        few = _of_few_draws(fitting)
        # An average over so few draws is off by about this, too.
        lack = _LACK / (few.generator.num_chains * few.generator.num_modes)
        return few if _error(few) + lack < _error(result) else result
    return result


def _of_few_draws(fitting: _Fitting) -> FittedSubspace:
    """Without a budget, with finer steps where the data determine functions more closely."""
    case = fitting.case
    for finer in _FINER if fitting.budget is None else _FINER[:1]:
        few = FewDraws(case.draws, case.inputs, None, case.rank, case.length, finer)
        found = replace(fitting, case=few).run()
        if _is_accepted(found):
            break
    return found


def _is_accepted(found: FittedSubspace) -> bool:
    return _error(found) <= math.log(_ACCEPTED_RATIO)


def _error(found: FittedSubspace) -> float:
    """Of the disagreement of draws on the data, as a logarithm; zero where it is not known."""
    return 0.0 if found.calibration is None else abs(math.log(found.calibration.ratio))


@dataclass(frozen=True)
class _Fitting:
    """How a generator is fitted and calibrated; parameters as for :func:`fit_default`."""

    case: Case
    functions: tuple[FunctionSpace, Probes] | None
    num_products: int
    budget: float | None
    keeps_rank: bool
    size_of: Callable[..., int]
    note: Callable[[str], None]

    def run(self) -> FittedSubspace:
        """Within the budget."""
        generator, default_bytes = self._fitted()
        result = self._calibrated(generator)
        if self.budget is None or default_bytes is None or self.budget >= default_bytes:
            return result
        return replace(result, default_bytes=default_bytes, default=self._default)

    def _fitted(self) -> tuple[SubspaceGenerator, int | None]:
        """The generator, and the bytes of the default where there is a budget; what the fit held is freed."""
        self.note("two passes over the draws")
        fits, case = LastFit(self.case.fit), self.case
        generator = fits.at(case.default_settings()).generator(is_last=self.budget is None)
        if self.budget is None:
            return generator, None
        default_bytes = self.size_of(generator)
        del generator
        self.note(f"steps for {self.budget:,.0f} bytes")
        relative = self.budget / default_bytes
        return within_budget(self.budget, fits, case, relative, self.size_of, self.keeps_rank), default_bytes

    def _calibrated(self, generator: SubspaceGenerator) -> FittedSubspace:
        give_back_freed()
        self.note("spread and noise")
        calibration = None
        if self.functions is not None:
            calibration = calibrate(
                generator, self.functions, self.case.draws, self.num_products, self.case.scales_modes
            )
        return FittedSubspace(generator, calibration)

    def _default(self) -> FittedSubspace:
        """Fitted again, since generators of one fit share their tensors."""
        return self._calibrated(self.case.fit(self.case.default_settings()).generator(is_last=True))


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
