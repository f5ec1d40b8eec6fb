# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A few draws of the chain itself: the baseline for a generator of as many bytes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_apd.baselines.descent import check_counts
from pyro_apd.baselines.error_feedback import STEPS, DrawRounding
from pyro_apd.distillation.layer_inputs import LayerInputs, layer_inputs
from pyro_apd.distillation.options import checked_budget
from pyro_apd.distillation.probes import Probes, RowArguments
from pyro_apd.distillation.source import Source, read_source
from pyro_apd.models.layout import Layout
from pyro_apd.predictive.draws import ChainsLike
from pyro_apd.predictive.predictive import function_values
from pyro_apd.runtime.checks import choice
from pyro_apd.runtime.global_state import preserved_param_store, seeded
from pyro_apd.runtime.seeds import checked_seed

logger = logging.getLogger("pyro_apd")

_METHODS = ("thinned", "herded")
_BITS = {f"int{bits}": bits for bits in STEPS}
_DTYPES = ("float32", "int8", *sorted(_BITS, reverse=True))
# Inputs at which draws are compared as functions.
_NUM_PROBES = 64
# Draws under which inputs of layers are gathered, and rows of the data.
_NUM_INPUT_DRAWS, _NUM_INPUT_ROWS = 4, 1024


class StoredDraws(dict[str, Tensor]):
    """Values ``(K, ...)`` by site, as they are after decoding.

    :ivar str dtype: in which they are stored.
    :ivar int num_draws: K.
    :ivar int num_bytes: what numbers and scales take, without names and shapes.
    """

    def __init__(self, values: dict[str, Tensor], dtype: str, num_draws: int, num_bytes: int) -> None:
        super().__init__(values)
        self.dtype, self.num_draws, self.num_bytes = dtype, num_draws, num_bytes


def stored_draws(
    source: ChainsLike,
    num_draws: int | None = None,
    *,
    byte_budget: float | int | None = None,
    method: str = "thinned",
    dtype: str = "float32",
    model: Callable[..., Any] | None = None,
    data: Sequence[Any] | None = None,
    group_by_chain: bool = False,
    seed: int | None = None,
) -> StoredDraws:
    """Chooses draws of a chain to keep, and rounds them to the precision in which they are stored.

    ``"thinned"``: evenly spaced in time, chains taking turns. ``"herded"``: by kernel herding (Chen, Welling & Smola,
    UAI 2010) with the energy distance in function space; each draw added makes the distance of those chosen to all
    draws, averaged over inputs near the data and far from them, as small as it can.

    ``dtype="int8"`` rounds to one byte per number, with one scale per row of a matrix. ``"int4"``, ``"int3"`` and
    ``"int2"`` store matrices of weights as differences from the mean of their chain, or of all draws where chains are
    alike or few draws are kept. Errors are passed on from column to column (GPTQ; Frantar et al., ICLR 2023) by the
    inputs that each layer has on ``data``. The last matrix of the model, biases, and sites whose inputs are not seen
    are in int8. Constrained sites are rounded in unconstrained space, so that their values stay within the support.

    :param source: an ``MCMC`` after ``run``; or draws by site, ``(S, ...)``, with ``group_by_chain`` ``(C, S, ...)``.
    :param int num_draws: K, how many to keep.
    :param byte_budget: in place of ``num_draws``: as many as fit into so many networks of the draws' own precision (a
        float), or bytes (an integer); all draws where these take less.
    :param str method: ``"thinned"`` or ``"herded"``.
    :param str dtype: ``"float32"`` (draws as they are), ``"int8"``, ``"int4"``, ``"int3"`` or ``"int2"``.
    :param callable model: the Pyro model; by default that of the ``MCMC``'s kernel. ``"herded"``, and dtypes below
        ``"int8"``, need it.
    :param tuple data: arguments of the model, with or without targets; by default those of the run.
    :param bool group_by_chain: whether a dict has a leading dimension for chains.
    :param int seed: of the inputs, without touching the global generator.
    :returns: values ``(K, ...)`` by site, in order of time: a dict, with the bytes that they take as ``num_bytes``.
    :raises ValueError: if there are fewer draws than that, not even one fits into the budget, ``method`` or ``dtype``
        is not known, or the model is not.

    Example::

        kept = stored_draws(mcmc, byte_budget=2.0, dtype="int3")
        Predictive(model, posterior_samples=kept)(x_test)
        print(kept.num_draws, kept.num_bytes)
    """
    choice("method", method, _METHODS)
    choice("dtype", dtype, _DTYPES)
    if (num_draws is None) == (byte_budget is None):
        raise ValueError(
            f"Give either `num_draws`, how many to keep, or `byte_budget`, what they may take; got {num_draws} and "
            f"{byte_budget}."
        )
    if num_draws is not None:
        check_counts(num_draws=num_draws)
    if byte_budget is not None:
        byte_budget = checked_budget(byte_budget)
    seed = checked_seed(seed)
    draws = read_source(source, model, data, group_by_chain)
    available = draws.theta_CSD.shape[:2].numel()
    if num_draws is not None and num_draws > available:
        raise ValueError(f"`num_draws` must be at most {available}, the draws that there are; got {num_draws}.")
    with seeded(seed, draws.theta_CSD.device), preserved_param_store(), torch.no_grad():
        precision = _Precision(draws, dtype, num_draws, byte_budget)
        index_K = _chosen(draws, precision.num_draws, method).to(draws.theta_CSD.device)
        theta_KD = precision.rounded(index_K)
    return StoredDraws(draws.layout.constrain(theta_KD), dtype, precision.num_draws, precision.num_bytes)


class _Precision:
    """How draws of a source are stored, and how many.

    :raises ValueError: if not one draw fits into the budget, or error feedback is asked for without a model or its
        data.
    """

    def __init__(self, draws: Source, dtype: str, num_draws: int | None, byte_budget: float | int | None) -> None:
        self._theta_CTD = draws.theta_CSD
        itemsize = draws.theta_CSD.dtype.itemsize
        self._network_bytes = draws.layout.size * itemsize
        self._rounding: DrawRounding | None = None
        self._num_means = 1
        if dtype != "float32":
            inputs = _feedback_inputs(draws, dtype) if dtype in _BITS else []
            self._rounding = DrawRounding(draws.layout, _BITS.get(dtype, 8), inputs, itemsize)
            most = len(self._theta_CTD)
            count = self._most_draws(byte_budget, most) if num_draws is None else num_draws
            self._num_means = most if self._rounding.pays_for_means(self._theta_CTD, count) else 1
        self.num_draws = self._most_draws(byte_budget, self._num_means) if num_draws is None else num_draws
        self.num_bytes = self._bytes(self.num_draws)
        if self.num_draws == 0:
            raise ValueError(
                f"byte_budget={byte_budget}: one draw in {dtype} takes {self._bytes(1):,} bytes. Give more, or another "
                "dtype."
            )

    def _bytes(self, num_draws: int) -> int:
        if self._rounding is None:
            return num_draws * self._network_bytes
        return self._rounding.num_bytes(num_draws, self._num_means)

    def _most_draws(self, byte_budget: float | int | None, num_means: int) -> int:
        assert byte_budget is not None
        num_bytes = byte_budget if isinstance(byte_budget, int) else byte_budget * self._network_bytes
        if self._rounding is None:
            count = int(num_bytes) // self._network_bytes
        else:
            count = self._rounding.most_draws(num_bytes, num_means)
        return min(count, self._theta_CTD.shape[:2].numel())

    def rounded(self, index_K: Tensor) -> Tensor:
        """Draws ``(K, D)``, numbered in order of time with chains taking turns, as they decode."""
        num_chains = len(self._theta_CTD)
        chain_K = index_K % num_chains
        theta_KD = self._theta_CTD[chain_K, index_K // num_chains]
        if self._rounding is None:
            return theta_KD
        means_CD = self._theta_CTD.mean(1)
        if self._num_means == 1:
            means_CD, chain_K = means_CD.mean(0, keepdim=True), torch.zeros_like(chain_K)
        return self._rounding.rounded(theta_KD, means_CD, chain_K)


def _feedback_inputs(draws: Source, dtype: str) -> list[LayerInputs]:
    """Matrices to round with error feedback: those whose inputs are seen, without the last of the model."""
    if draws.model is None or draws.args is None:
        raise ValueError(
            f"dtype={dtype!r} rounds weights by the inputs of their layers: give `model` and `data`, or an MCMC after "
            "run."
        )
    theta_SD = draws.theta_CSD.flatten(0, 1)
    index_S = torch.linspace(0, len(theta_SD) - 1, _NUM_INPUT_DRAWS, dtype=torch.float64).round().long()
    seen = _seen_inputs(draws.model, draws, theta_SD[index_S.to(theta_SD.device)])
    found = [one for name, one in seen.items() if name != _last_matrix(draws.layout)]
    if not found:
        logger.warning("No inputs of hidden layers are seen in this model: all weights are stored in int8.")
    return found


def _seen_inputs(model: Callable[..., Any], draws: Source, theta_SD: Tensor) -> dict[str, LayerInputs]:
    """Inputs on some rows of the data, or on all data for a model that cannot be run on some."""
    try:
        on_rows = RowArguments(model, draws.args or (), draws.kwargs)
        rows = Probes(on_rows.rows, unchanged=True).draw(_NUM_INPUT_ROWS)
        return layer_inputs(on_rows, draws.layout, theta_SD, rows)
    except Exception as error:
        logger.info("The model cannot be run on a subset of rows (%s).", error)
    return layer_inputs(functools.partial(model, **draws.kwargs), draws.layout, theta_SD, draws.args or ())


def _last_matrix(layout: Layout) -> str | None:
    names = [site.name for site in layout if len(site.unconstrained_shape) >= 2]
    return names[-1] if names else None


def _chosen(draws: Source, num_draws: int, method: str) -> Tensor:
    """Numbers ``(K,)`` of draws, in order of time with chains taking turns."""
    if method == "thinned":
        num_chains, num_times, _ = draws.theta_CSD.shape
        return thinned(num_chains, num_times, num_draws)
    theta_ND = draws.theta_CSD.transpose(0, 1).flatten(0, 1)
    return herded(_values(draws, theta_ND), num_draws).sort().values


def thinned(num_chains: int, num_times: int, num_draws: int) -> Tensor:
    """Numbers ``(K,)`` of draws that are evenly spaced in each chain, equally many of each but for a remainder."""
    numbers = []
    for chain in range(num_chains):
        count = num_draws // num_chains + (chain < num_draws % num_chains)
        first = 0 if count > 1 else num_times // 2
        times = torch.linspace(first, num_times - 1, count, dtype=torch.float64).round().long()
        numbers.append(times * num_chains + chain)
    return torch.cat(numbers).sort().values


def herded(values_SNF: Tensor, num_draws: int) -> Tensor:
    """Indices ``(K,)`` of draws in the order in which they are chosen, by what each computes: ``(S, N, F)``.

    Distances at an input are relative to their mean there, so that all inputs count alike.
    """
    distance_SS = values_SNF.new_zeros(len(values_SNF), len(values_SNF))
    for part_NSF in values_SNF.transpose(0, 1).split(8):
        distance_NSS = torch.cdist(part_NSF, part_NSF)
        distance_SS += (distance_NSS / distance_NSS.mean((1, 2), keepdim=True).clamp_min(1e-12)).sum(0)
    to_all_S, to_chosen_S = distance_SS.mean(1), torch.zeros_like(distance_SS[0])
    is_chosen_S = torch.zeros(len(distance_SS), dtype=torch.bool, device=distance_SS.device)
    chosen = []
    for k in range(num_draws):
        score_S = (to_all_S - to_chosen_S / (k + 1)).masked_fill(is_chosen_S, torch.inf)
        chosen.append(score_S.argmin())
        is_chosen_S[chosen[-1]] = True
        to_chosen_S = to_chosen_S + distance_SS[chosen[-1]]
    return torch.stack(chosen)


def _values(draws: Source, theta_ND: Tensor) -> Tensor:
    if draws.model is None or draws.args is None:
        raise ValueError("method='herded' compares draws as functions: give `model` and `data`, or an MCMC after run.")
    tensors = [value for value in draws.args if isinstance(value, Tensor) and value.dim() > 0]
    if not tensors:
        raise ValueError("method='herded' needs a tensor of inputs among `data`; there is none.")
    inputs = Probes([tensors[0]]).draw(_NUM_PROBES)
    return function_values(draws.model, draws.layout.constrain(theta_ND), *inputs)
