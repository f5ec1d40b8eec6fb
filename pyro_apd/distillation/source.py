# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Where a distillation starts: draws in flat unconstrained form, and the model they belong to where it is known."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_apd.chains.stores.base import DrawStore
from pyro_apd.chains.summary import sampler_summary
from pyro_apd.data.sources import shown_arguments
from pyro_apd.distillation.probes import RowArguments
from pyro_apd.models.frozen import FrozenTensors
from pyro_apd.models.layout import Layout
from pyro_apd.predictive.chain_draws import chain_remarks
from pyro_apd.predictive.draws import ChainsLike, all_finite, kernel_of, not_finite_error, read_chains, run_arguments
from pyro_apd.runtime.global_state import preserved_param_store, seeded

logger = logging.getLogger("pyro_apd")

#: No generator is fitted to fewer draws than this, over all chains.
MIN_DRAWS = 10
#: Of every ``period`` draws of a chain, ``length`` from ``start`` on are held out; of fewer, none can be spared.
HELD_OUT = {"period": 25, "start": 10, "length": 5}
_BY_CHAIN = (
    " If the first dimension of its tensors is that of chains, as after get_samples(group_by_chain=True), pass "
    "group_by_chain=True here as well."
)
# Rows by which the sites and frozen tensors of a model are found.
_FEW_ROWS = 4
# Largest numbers of draws, as a power of the largest number of their dtype.
_LARGEST_POWER = 0.4


@dataclass(frozen=True)
class Source:
    """Draws and their model.

    :ivar Tensor theta_CSD: draws by chain.
    :ivar Layout layout: which entry belongs to which site.
    :ivar model: the Pyro model, or None.
    :ivar args: arguments that the model can be called with, or None where they are not known.
    :ivar kwargs: keyword arguments likewise.
    :ivar bool has_all_data: whether the arguments hold all data, rather than some that a loader or a file gave.
    :ivar list missing_chains: numbers of the chains of the run that have no draws here: they diverged, or stopped.
    :ivar frozen: frozen tensors of the model, where they are known from a run.
    :ivar sampler: kernel, step size and warnings of the run, see :mod:`pyro_apd.chains.summary`.
    """

    theta_CSD: Tensor
    layout: Layout
    model: Callable[..., Any] | None = None
    args: tuple[Any, ...] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    has_all_data: bool = True
    missing_chains: Sequence[int] = ()
    frozen: FrozenTensors | None = None
    sampler: Mapping[str, Any] = field(default_factory=dict)

    def frozen_tensors(self) -> FrozenTensors | None:
        """Frozen parameters and buffers of the model; None where they are not known."""
        if self.frozen is not None or self.model is None:
            return self.frozen
        few = None if self.args is None else _few_rows(self.model, self.args, self.kwargs)
        found = None if few is None else FrozenTensors.of(self.model, self.layout.names, tuple(few[0]), few[1])
        return found or FrozenTensors.of(self.model, self.layout.names, self.args, self.kwargs)


def read_source(
    source: ChainsLike,
    model: Callable[..., Any] | None = None,
    data: Sequence[Any] | None = None,
    group_by_chain: bool = False,
) -> Source:
    """Draws of an ``MCMC`` after ``run``, of a store, or of a dict. Arguments as in :func:`~pyro_apd.distill`.

    Draws that this package's driver keeps are taken as they are, without a copy.

    :raises TypeError: if ``source`` is none of them, or ``data`` is not a tuple.
    :raises ValueError: if draws are missing, malformed, not finite, or not of the model's sites.
    :raises ArtifactError: if the model that was sampled had other frozen weights.
    """
    if data is not None and not isinstance(data, (tuple, list)):
        raise TypeError(
            f"`data` must be the tuple of the model's arguments, such as (x, y); got {type(data).__name__}."
        )
    kernel = kernel_of(source)
    model = getattr(kernel, "model", None) if model is None else model
    args: tuple[Any, ...] | None = None if data is None else tuple(data)
    kwargs: dict[str, Any] = {}
    has_all_data = True
    given = run_arguments(source)
    if args is None and given is not None:
        args, kwargs, has_all_data = shown_arguments(*given, getattr(kernel, "num_data", None))
    store = source if isinstance(source, DrawStore) else getattr(source, "store", None)
    if isinstance(store, DrawStore):
        theta_CSD = store.unconstrained()
        _check_count(*theta_CSD.shape[:2])
        _check_finite(store, theta_CSD)
        _check_size(store.layout, theta_CSD)
        missing = list(getattr(source, "missing_chains", ()))
        for remark in chain_remarks(missing, getattr(source, "diverged_chains", ())):
            logger.warning("%s", remark)
        found = Source(theta_CSD, store.layout, model, args, kwargs, has_all_data, missing)
        return replace(found, frozen=_checked_frozen(store, found), sampler=sampler_summary(source))
    chains = read_chains(source, "source", group_by_chain=group_by_chain)
    _check_floating(chains.values)
    hint = "" if group_by_chain or not isinstance(source, Mapping) else _BY_CHAIN
    _check_count(chains.num_chains, chains.num_draws, hint)
    layout = _find_layout(kernel, model, args, kwargs, chains.values)
    theta_CSD = layout.unconstrain(chains.values)
    _check_interior(layout, theta_CSD)
    _check_size(layout, theta_CSD)
    return Source(theta_CSD, layout, model, args, kwargs, has_all_data, sampler=sampler_summary(source))


def split_held_out(num_draws: int) -> tuple[Tensor, Tensor]:
    """Indices of a chain's draws to train on, and to hold out: the middle fifth of every 25 draws.

    Neighbouring draws are correlated, so runs of draws are held out rather than single ones. The runs are spread over
    the chain: the end of a chain that has not converged differs from its middle, and a generator evaluated there would
    be evaluated on a part that it never saw. The correlation that is left between training and held-out draws hardly
    biases the metrics, since a generator is far too small to memorise draws.
    """
    index = torch.arange(num_draws)
    if num_draws < HELD_OUT["period"]:
        return index, index
    start, length = HELD_OUT["start"], HELD_OUT["length"]
    is_held_out = (index % HELD_OUT["period"] >= start) & (index % HELD_OUT["period"] < start + length)
    return index[~is_held_out], index[is_held_out]


def num_draws_for(num_held_out: int) -> int:
    """Draws of a chain of which so many are held out."""
    return int(HELD_OUT["period"]) * -(-num_held_out // int(HELD_OUT["length"]))


def _check_floating(values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        if not value.is_floating_point():
            raise ValueError(
                f"Draws of site '{name}' are {value.dtype}; a generator makes floating-point numbers only."
            )
        if value.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"Draws of site '{name}' are {value.dtype}; a generator is fitted to float32 or float64. Convert them."
            )


def _check_count(num_chains: int, num_draws: int, hint: str = "") -> None:
    if num_chains * num_draws < MIN_DRAWS:
        raise ValueError(
            f"`source` holds too few draws: {num_chains * num_draws} (chains: {num_chains}, draws of each: "
            f"{num_draws}); at least {MIN_DRAWS} are needed to fit a generator, and a few hundred to fit it well. Run "
            f"the chain for longer.{hint}"
        )


def _check_size(layout: Layout, theta_CSD: Tensor) -> None:
    """Squares of draws, and sums of these, must neither overflow nor become zero."""
    largest = torch.finfo(theta_CSD.dtype).max ** _LARGEST_POWER
    for name, value in layout.split(theta_CSD).items():
        size = max((float(row.abs().max()) for row in value.flatten(0, 1) if row.numel()), default=0.0)
        if size > largest or 0 < size < 1 / largest:
            raise ValueError(
                f"Draws of site '{name}' are up to {size:.3g} (unconstrained); of {theta_CSD.dtype}, {1 / largest:.1g} "
                f"to {largest:.1g} are accepted. Scale the site, or use draws in double precision."
            )


def _check_finite(store: DrawStore, theta_CSD: Tensor) -> None:
    for name, value in store.layout.split(theta_CSD).items():
        if not all_finite(value):
            count = sum(int((~row.isfinite()).sum()) for row in value.flatten(0, 1))
            raise not_finite_error(name, "source", count)


def _checked_frozen(store: DrawStore, source: Source) -> FrozenTensors | None:
    """The frozen tensors that the model has now, compared with those that the run noted."""
    noted = store.frozen
    if noted is None:
        return None
    present = source.frozen_tensors()
    if present is None or source.model is None:
        return noted
    noted.check(source.model, present.values)
    return present


def _check_interior(layout: Layout, theta_CSD: Tensor) -> None:
    """Draws on the very edge of a support have no unconstrained value."""
    for name, value in layout.split(theta_CSD).items():
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"Draws of site '{name}' lie on or outside the boundary of its support, {layout[name].support}."
            )


def _find_layout(
    kernel: object,
    model: Callable[..., Any] | None,
    args: tuple[Any, ...] | None,
    kwargs: Mapping[str, Any],
    draws: Mapping[str, Tensor],
) -> Layout:
    """The kernel's, else the model's, else one in which every site is real."""
    layout = getattr(kernel, "layout", None)
    if isinstance(layout, Layout) and set(layout.names) == set(draws):
        return layout
    if model is not None and args is not None:
        found = _layout_of_few_rows(model, args, kwargs, draws)
        return _traced_layout(partial(model, *args, **kwargs), draws) if found is None else found
    logger.info("The supports of sites are not known without model and data: every site counts as real.")
    return Layout({name: value.shape[2:] for name, value in draws.items()})


def _layout_of_few_rows(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], draws: Mapping[str, Tensor]
) -> Layout | None:
    """The layout by a run on a few rows; None where the model takes no others than all, or its latents have a row
    each."""
    few = _few_rows(model, args, kwargs)
    if few is None:
        return None
    try:
        layout = _traced_layout(partial(model, *few[0], **few[1]), draws)
    except Exception as error:
        logger.debug("The model cannot be run on a subset of rows (%s).", error)
        return None
    is_same = all(layout[name].shape == value.shape[2:] for name, value in draws.items())
    return layout if is_same else None


def _few_rows(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]] | None:
    """A few rows of a model's arguments, since a run on all may not fit into memory; None if there are no rows."""
    try:
        rows = RowArguments(model, args, kwargs)
    except ValueError:
        return None
    return rows.of(*(value[:_FEW_ROWS] for value in rows.rows))


def _traced_layout(model: Callable[[], Any], draws: Mapping[str, Tensor]) -> Layout:
    with preserved_param_store(), torch.no_grad(), poutine.block(), seeded(0):
        return Layout.from_trace(poutine.trace(model).get_trace(), list(draws))
