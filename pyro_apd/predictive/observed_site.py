# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The observed site of a model as a function of its latents: its distribution, for every draw and every datum."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_apd.data.arguments import explaining_errors
from pyro_apd.errors import ModelError
from pyro_apd.models.frozen import reading
from pyro_apd.models.shared_features import with_features
from pyro_apd.predictive.draws import Draws, DrawSource, Values, check_chunk_size, check_draws, draws_between
from pyro_apd.predictive.messengers import Reached, Substitute, choose_site, is_choosing_rows, plain
from pyro_apd.predictive.row_blocks import RowCut, plan_cut
from pyro_apd.predictive.site_names import check_sites
from pyro_apd.predictive.vmap_draws import (
    DrawFunction,
    Footprint,
    map_chunk,
    map_draws,
    map_one_by_one,
    vmap_conditions,
)
from pyro_apd.runtime.global_state import preserved_param_store, seeded
from pyro_apd.runtime.vectorisation import vectorised

#: From the traced observed site to a tensor of shape ``batch_shape + (..., F)``: ``F`` numbers a datum.
Summary = Callable[[Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class _Rows:
    """A plate that shows the model ``subsample_size`` of its ``size`` rows, and how to show them all.

    :ivar Tensor blocks: ``(blocks, subsample_size)`` indices that cover every row; the last row fills up.
    :ivar int dim: the plate's dimension, counted from the right of the batch shape.
    """

    name: str
    size: int
    dim: int
    blocks: Tensor


@dataclass(frozen=True)
class Piece:
    """Some draws of some data.

    :ivar slice draws: which draws.
    :ivar slice data: which data.
    :ivar int num_data: how many there are in all.
    :ivar Tensor value: ``(draws, data, F)``.
    """

    draws: slice
    data: slice
    num_data: int
    value: Tensor


class ObservedSite:
    """One observed site of a model, evaluated for many draws of the latents.

    Computes once what does not depend on the draws: the site, the subsampling plates, the size of a chunk.

    :param callable model: a Pyro model; need not be given its targets.
    :param dict draws: values of its latents ``(S, ...)``; the first draw serves as an example.
    :param tuple args: the model's arguments.
    :param dict kwargs: the model's keyword arguments.
    :param str site: the observed site; None where the model has one only.
    :raises ValueError: if draws are malformed, or ``site`` is not one of the model's.
    :raises ModelError: if the model has no observed site, or several and ``site`` is None.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        draws: Draws,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        site: str | None = None,
    ) -> None:
        check_draws(draws)
        args, kwargs = with_features(model, args, kwargs)
        self.model = model
        first = {name: value.detach() for name, value in draws_between(draws, 0, 1).items()}
        example = {name: value[0] for name, value in first.items()}
        with preserved_param_store(), torch.no_grad(), poutine.block():
            known = set(pyro.get_param_store().keys())
            explained = explaining_errors(args, kwargs, lambda: example)
            with Footprint() as self._footprint, explained, reading(model) as read:
                tracer = poutine.trace(Substitute(example)(model))
                try:
                    trace = tracer.get_trace(*args, **kwargs)
                except (RuntimeError, ValueError):
                    _explain_draws(tracer.msngr.trace.nodes, first)
                    raise
            check_sites(trace.nodes, first, "draws")
            if isinstance(draws, DrawSource) and draws.check is not None:
                draws.check(model, read)
            # Parameters that the model has just made, which it cannot make again under vmap.
            self._params = {name: trace.nodes[name]["value"] for name in trace.param_nodes if name not in known}
            self.name = choose_site(trace, example, site)
            prototype = trace.nodes[self.name]
            #: The distribution at the example draw.
            self.fn = plain(prototype["fn"])
            #: Whether the arguments hold a value for it.
            self.is_observed = bool(prototype["is_observed"])
            self._batch_ndim = len(prototype["fn"].batch_shape)
        # What the site is at the example draw, so that asking for it does not run the model again.
        self._prototype, self._prototype_args = prototype, (*args, *kwargs.values())
        self._example = example
        self._dims = {frame.name: frame.dim for frame in prototype["cond_indep_stack"] if frame.vectorized}
        self._subsampled = {name: node for name, node in trace.nodes.items() if is_choosing_rows(node)}
        self._rows: dict[Summary, tuple[_Rows, ...]] = {}

    def evaluate(
        self,
        summary: Summary,
        draws: Draws,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        chunk_size: int | None = None,
    ) -> Tensor:
        """``summary`` of the site for every draw and datum, ``(S, N, F)``; differentiable where gradients are enabled.

        Batch and event dimensions are flattened into ``N``, rows that a plate leaves out are included.
        """
        num_draws = check_draws(draws)
        check_chunk_size(chunk_size)
        args, kwargs = with_features(self.model, args, kwargs)
        if torch.is_grad_enabled():
            with preserved_param_store(), poutine.block():
                function = self._of_one_draw(summary, args, kwargs)
                # With gradients all activations are kept anyway.
                return map_draws(function, draws, num_draws, chunk_size or num_draws, self.model)["value"]
        whole: list[Tensor] = []

        def keep(piece: Piece) -> None:
            if not whole:
                whole.append(piece.value.new_empty((num_draws, piece.num_data, piece.value.shape[-1])))
            whole[0][piece.draws, piece.data] = piece.value

        self.stream(keep, summary, draws, args, kwargs, chunk_size=chunk_size)
        return whole[0]

    def stream(
        self,
        consume: Callable[[Piece], None],
        summary: Summary,
        draws: Draws,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        chunk_size: int | None = None,
    ) -> None:
        """Gives ``consume`` the same a piece at a time, without gradients: draws in order, and all data of each.

        Data are cut where that is known to make no difference; ``chunk_size`` counts draws.
        """
        num_draws = check_draws(draws)
        check_chunk_size(chunk_size)
        args, kwargs = with_features(self.model, args, kwargs)
        is_one_by_one = False
        with preserved_param_store(), poutine.block(), torch.no_grad():
            whole_rows = self._of_one_draw(summary, args, kwargs)
            cut = None if self._rows[summary] else self._row_cut(summary, num_draws, chunk_size, args, kwargs)
            functions = [(slice(None), whole_rows)] if cut is None else self._cut_functions(cut, summary, args, kwargs)
            if chunk_size is None:
                times = math.prod(len(plate.blocks) for plate in self._rows[summary])
                chunk_size = self._footprint.chunk_size(num_draws, times) if cut is None else cut.num_draws
            for start in range(0, num_draws, chunk_size):
                stop = min(start + chunk_size, num_draws)
                part = draws_between(draws, start, stop)
                for data, function in functions:
                    value = None
                    if not is_one_by_one:
                        value = vectorised(partial(_of_chunk, function, part, stop - start), self.model)
                        is_one_by_one = value is None
                    if value is None:
                        value = map_one_by_one(function, part, stop - start)["value"]
                    num_data = value.shape[1] if cut is None else cut.num_data
                    consume(Piece(slice(start, stop), data, num_data, value))

    def _of_one_draw(self, summary: Summary, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> DrawFunction:
        if summary not in self._rows:
            self._rows[summary] = self._find_rows(summary, args, kwargs)
        rows = self._rows[summary]

        def of_one(latents: Values, vectorised: bool) -> Values:
            value = self._all_rows(summary, latents, args, kwargs, rows, {}, vectorised)
            return {"value": value.reshape(-1, value.shape[-1])}

        return of_one

    def _row_cut(
        self, summary: Summary, num_draws: int, chunk_size: int | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> RowCut | None:
        """How to cut the rows of the arguments, or None where that may change results or does not help.

        Rows are independent where a few of them, alone, give what they give among all: a model that looks at other
        rows (batch normalisation, a mean over the data) or at their number gives something else.
        """
        cut = plan_cut(self._footprint.largest, num_draws, chunk_size, args, kwargs)
        if cut is None:
            return None
        given = (*args, *kwargs.values())
        is_known = len(given) == len(self._prototype_args) and all(map(operator.is_, given, self._prototype_args))
        with seeded(0):
            whole = summary(self._prototype) if is_known else self._at(summary, self._example, args, kwargs, {})
            try:
                for span in (slice(0, 2), slice(cut.num_rows - 3, cut.num_rows)):
                    alone = self._at(summary, self._example, *cut.of(span, args, kwargs), {})
                    if whole.shape[0] != cut.num_rows or not _is_same(alone, whole[span]):
                        return None
            except Exception:  # a model that insists on its number of rows
                return None
        return replace(cut, num_data=whole[..., 0].numel())

    def _cut_functions(
        self, cut: RowCut, summary: Summary, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> list[tuple[slice, DrawFunction]]:
        entries = cut.num_data // cut.num_rows
        return [
            (slice(span.start * entries, span.stop * entries), self._of_one_draw(summary, *cut.of(span, args, kwargs)))
            for span in cut.spans()
        ]

    @property
    def is_subsampled(self) -> bool:
        """Whether what was found out about rows holds for these arguments alone."""
        return bool(self._subsampled)

    def _at(
        self, summary: Summary, latents: Values, args: tuple[Any, ...], kwargs: Mapping[str, Any], indices: Values
    ) -> Tensor:
        """``summary`` at one draw and one choice of rows."""
        handler = Substitute({**latents, **indices}, self._params, until=self.name)
        try:
            with handler:
                self.model(*args, **kwargs)
        except Reached:
            pass
        if handler.reached is None:
            raise ModelError(
                f"The model did not come to site '{self.name}', which it had before; its sites must not vary."
            )
        return summary(handler.reached)

    def _all_rows(
        self,
        summary: Summary,
        latents: Values,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        rows: tuple[_Rows, ...],
        indices: Values,
        vectorised: bool,
    ) -> Tensor:
        """``summary`` at one draw with every row of every subsampling plate.

        The model insists on ``subsample_size`` rows at a time, so it is mapped over blocks of as many.
        """
        if not rows:
            return self._at(summary, latents, args, kwargs, indices)
        plate, *inner = rows

        def of_block(block: Tensor) -> Tensor:
            chosen = {**indices, plate.name: block}
            return self._all_rows(summary, latents, args, kwargs, tuple(inner), chosen, vectorised)

        if vectorised:
            value = torch.vmap(of_block, randomness="different")(plate.blocks)
        else:
            value = torch.stack([of_block(block) for block in plate.blocks])
        dim = self._batch_ndim + plate.dim
        return value.movedim(0, dim).flatten(dim, dim + 1).narrow(dim, 0, plate.size)

    def _find_rows(self, summary: Summary, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[_Rows, ...]:
        """The plates that leave out rows of the site.

        A plate may also be told that its rows were chosen outside, as in ``plate("data", N, subsample_size=len(x))``:
        nothing depends on the indices then, and the rows at hand are all there are.
        """
        shown = {name: node["value"] for name, node in self._subsampled.items()}
        rows = []
        for name, node in self._subsampled.items():
            blocks = _blocks(node["fn"].size, len(node["value"]), node["value"].device)

            def of_block(block: Tensor, name: str = name) -> Tensor:
                return self._at(summary, self._example, args, kwargs, {**shown, name: block})

            with torch.no_grad():
                if not _depends(of_block, blocks, self.model):
                    continue
            if name not in self._dims:
                raise ModelError(
                    f"Site '{self.name}' depends on the rows that plate '{name}' draws, but is not inside that plate; "
                    "put the sample statement inside, or call the model without subsampling."
                )
            rows.append(_Rows(name, node["fn"].size, self._dims[name], blocks))
        return tuple(rows)


def _explain_draws(nodes: Mapping[str, Any], first: Values) -> None:
    """Raises the cause where a model fails because of the draws.

    :raises ValueError: if their sites, shapes or dtypes are not the model's.
    """
    check_sites(nodes, first, "draws")
    dtypes = {name: str(value.dtype) for name, value in first.items()}
    if len(set(dtypes.values())) > 1 or not any(value.is_floating_point() for value in first.values()):
        raise ValueError(f"The model fails with draws of these dtypes: {dtypes}. Give all of them the model's dtype.")


def _blocks(size: int, shown: int, device: torch.device) -> Tensor:
    """Indices ``(blocks, shown)`` that cover ``size`` rows; the last row fills up the last block."""
    num_blocks = -(-size // shown)
    return torch.arange(num_blocks * shown, device=device).clamp(max=size - 1).reshape(num_blocks, shown)


def _is_same(value: Tensor, expected: Tensor) -> bool:
    """Whether two results are the same but for rounding."""
    if value.shape != expected.shape:
        return False
    finite = expected.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return bool(torch.isclose(value, expected, rtol=1e-4, atol=1e-5 * scale).all())


def _depends(function: Callable[[Tensor], Tensor], blocks: Tensor, model: object) -> bool:
    """Whether a result of a model depends on which block of rows it is for."""

    def varies() -> bool:
        with vmap_conditions():
            # Where nothing depends on what is mapped over, vmap repeats one result without copying it.
            return torch.vmap(function, randomness="same")(blocks).stride(0) != 0

    found = vectorised(varies, model, "blocks of rows")
    return not torch.equal(function(blocks[0]), function(blocks[1])) if found is None else found


def _of_chunk(function: DrawFunction, part: Values, num_draws: int) -> Tensor:
    return map_chunk(function, part, num_draws)["value"]
