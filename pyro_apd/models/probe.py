# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Runs a model on batches of different rows and different sizes, and compares what its sites add to the density."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_apd.data.minibatch import ProbeRows
from pyro_apd.errors import ModelError
from pyro_apd.models.probe_batches import Pair, first_rows, random_pair, second_rows, unlike_pairs
from pyro_apd.models.probe_messages import (
    by_number_message,
    changing_site_message,
    latent_in_plate_message,
    not_by_row_message,
    other_number_message,
)
from pyro_apd.models.ranks import refuse_ranks
from pyro_apd.models.row_gradients import gradients_differ, rounding_hides
from pyro_apd.models.row_terms import ModelRun, RowProbe, SiteTerms, differs, totals_differ
from pyro_apd.runtime.global_state import seeded

# All rows are run at once where they hold at most so many numbers, or make so many batches.
_MAX_FULL_NUMBERS = 4_000_000
_MAX_FULL_BATCHES = 8
# All rows are compared with the batches that they make, where these are so few; of more, so many where they are small.
_MAX_PARTS = 12
_FEW_ROWS = 4
# Pairs of batches of random rows, by point; the first points are near the start, where more is compared.
_NUM_RANDOM = (0, 2, 1, 1)
_NUM_NEAR = 2

logger = logging.getLogger("pyro_apd")

#: Constrained values of the latents, by site.
Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Runs:
    """Runs of a model with the same values of its latents.

    With parts a, c and a', c' of two batches:

    :ivar exchanges: runs on (a, c), (a', c'), (c', a) and (c, a'), as many rows as a mini-batch has, several times.
    :ivar one_more: runs on p, q, and on each with the same row more; empty where a plate of the model does not take
        such a number of rows.
    :ivar splits: runs on many rows, on a part of them and on the rest.
    """

    exchanges: tuple[tuple[ModelRun, ...], ...]
    one_more: tuple[ModelRun, ...]
    splits: tuple[tuple[ModelRun, ...], ...]

    @property
    def one(self) -> ModelRun:
        """The first run, on as many rows as a mini-batch has."""
        return self.exchanges[0][0]

    @property
    def resized(self) -> ModelRun | None:
        """A run on another number of rows."""
        others = [run for run in self.all if run.num_rows != self.one.num_rows]
        return others[0] if others else None

    @property
    def all(self) -> list[ModelRun]:
        """All runs there are."""
        return [run for runs in (*self.exchanges, self.one_more, *self.splits) for run in runs]

    @property
    def unlike(self) -> list[ModelRun]:
        """Runs on other rows and on other numbers of rows."""
        return [*self.exchanges[0][:2], *self.one_more[1:], *(split[0] for split in self.splits)]


class Probe:
    """Finds how each site of a model depends on the rows of one :class:`~pyro_apd.data.minibatch.ProbeRows`.

    :param model: a Pyro model.
    :param int num_data: N.
    :param points: constrained values of the latents, at which the model is compared.
    """

    def __init__(self, model: Callable[..., Any], num_data: int, rows: ProbeRows, points: Sequence[Values]) -> None:
        self._model = model
        self._probe = RowProbe(model, rows)
        self._num_data = num_data
        self._rows = rows
        self._points = points
        self._generator = torch.Generator().manual_seed(0)
        self._made: dict[tuple[int, bytes], ModelRun] = {}
        # A plate that takes all its rows ignores their indices.
        most = num_data - 1 if rows.plate is not None else num_data
        is_most = rows.batch_size >= most and rows.batch_size > 1
        self._num_more = rows.batch_size - 1 if is_most else rows.batch_size + 1

    def check_latents_by_shape(self) -> None:
        """Refuses latents with one value for each row, by runs that draw them."""
        first, more = (self._drawn(count) for count in (self._rows.batch_size, self._num_more))
        if first is None or more is None:
            return
        for name, shape in first.items():
            if more.get(name, shape) != shape:
                raise ModelError(latent_in_plate_message(name, self._rows.plate or "over the rows of the data"))

    def _drawn(self, count: int) -> dict[str, torch.Size] | None:
        try:
            with seeded(0):
                trace = self._probe.trace(first_rows(self._rows, count))
        except Exception as error:
            self._explain(count, error)
            if self._rows.plate is None:
                raise
            return None
        return {name: trace.nodes[name]["value"].shape for name in self._points[0] if name in trace.nodes}

    def _explain(self, count: int, error: Exception) -> None:
        """Raises ModelError about a model that fails on another number of rows only, because of a shape."""
        if self._rows.plate is None and count != self._rows.batch_size and type(error) in (RuntimeError, ValueError):
            raise ModelError(other_number_message(self._rows.batch_size, error)) from error

    def check_independent(self, name: str) -> None:
        """Refuses a site that depends on data which the rows at hand, a part of all, have in common."""
        run = self.runs[-1].one
        other = None if self._rows.has_all else self._probe.with_other_data(run)
        if other is not None and name in other.observed and run.site(name).differs(other.site(name)):
            raise ModelError(
                f"Observed site '{name}' depends on data that are the same in the first batches, and does not follow "
                "the number of rows, so that its log-likelihood cannot be scaled by N/B. Shuffle the data, and observe "
                "one value for each row, in `with pyro.plate('data', len(x))`."
            )

    def check_ranks(self) -> None:
        """See :func:`~pyro_apd.models.ranks.refuse_ranks`."""
        run = self.runs[-1].one
        refuse_ranks(lambda: self._probe.run(run.rows, run.values), run.observed)

    @cached_property
    def runs(self) -> list[Runs]:
        """Runs at the start, and at each other point at which the model does not fail."""
        found = [self._runs_at(self._points[0])]
        for values in self._points[1:]:
            try:
                found.append(self._runs_at(values))
            except Exception as error:  # values that no chain may ever have, such as probabilities that round to 1
                logger.debug("The model is not compared at a point away from its start: %s.", error)
        known = set(found[0].one.observed)
        for run in (run for runs in found for run in runs.all):
            for name in known.symmetric_difference(run.observed):
                run.site(name)
                found[0].one.site(name)
        return found

    def _runs_at(self, values: Values) -> Runs:
        rows, place = self._rows, self._place(values)
        one, two = first_rows(rows, rows.batch_size), second_rows(rows, rows.batch_size)
        other = two if rows.num_rows >= 2 * rows.batch_size else one[torch.arange(len(one)) // 2]
        pairs = [random_pair(rows, self._generator) for _ in range(_NUM_RANDOM[place])]
        if place < _NUM_NEAR or not pairs:
            pairs.insert(0, (one, two))
        exchanges = [self._exchanged(*pair, values) for pair in pairs]
        splits = [self._split(*pair, values) for pair in pairs]
        unlike = unlike_pairs(rows, self._model, values, place, self._generator)
        if rows.batch_size > 1:
            exchanges += self._unlike_exchanged(unlike, values)
        else:
            splits += [self._split(*pair, values) for pair in unlike]
        return Runs(
            tuple(exchanges),
            self._one_row_more(one, other, values) if place < _NUM_NEAR else (),
            tuple(filter(None, [*splits, self._partition(values)])),
        )

    def _place(self, values: Values) -> int:
        return next(i for i, point in enumerate(self._points) if point is values)

    def _run(self, rows: Tensor, values: Values) -> ModelRun:
        """A run, made once."""
        key = id(values), rows.numpy().tobytes()
        if key not in self._made:
            try:
                self._made[key] = self._probe.run(rows, values)
            except Exception as error:
                self._explain(len(rows), error)
                raise
        return self._made[key]

    def _attempt(self, rows: Tensor, values: Values) -> ModelRun | None:
        """The same; None where the model fails, on a number of rows that it never meets in a run, or ignores ``rows``.

        A plate that takes all its rows ignores their indices.
        """
        if self._rows.plate is not None and len(rows) >= self._num_data > len(rows.unique()):
            return None
        try:
            return self._run(rows, values)
        except Exception:  # a model may do anything with a number of rows that it was not written for
            return None

    def _partition(self, values: Values) -> tuple[ModelRun, ...] | None:
        """Runs on many rows and on each batch of them; None where that is too much, or the model fails on one."""
        size, num_rows = self._rows.batch_size, self._rows.num_rows
        count = min(num_rows, _MAX_PARTS * size)
        is_point = self._place(values) == min(_NUM_NEAR, len(self._points)) - 1
        if not is_point or not self._is_affordable(count) or (count < num_rows and size > _FEW_ROWS):
            return None
        rows = first_rows(self._rows, count)
        runs = [self._attempt(part, values) for part in (rows, *rows.split(size))]
        found = tuple(run for run in runs if run is not None)
        return found if len(found) == len(runs) else None

    def _one_row_more(self, one: Tensor, other: Tensor, values: Values) -> tuple[ModelRun, ...]:
        """Runs on p, q, p and a row r, q and r, where p or p and r have the size of a batch.

        Empty where a plate of the model does not take one of those numbers.
        """
        count = min(self._num_more, len(one))
        few = one[:count], other[:count]
        run = self._run if self._rows.plate is None else self._attempt
        extra = torch.tensor([self._rows.num_rows // 2])
        runs = [run(rows, values) for rows in (*few, *(torch.cat([rows, extra]) for rows in few))]
        found = tuple(run for run in runs if run is not None)
        return found if count and len(found) == len(runs) else ()

    def _split(self, one: Tensor, two: Tensor, values: Values) -> tuple[ModelRun, ...] | None:
        """Runs on many rows, on a part of them, and on the rest; None where the model fails on one of them."""
        half = len(one) // 2
        together = torch.cat([one, two]), one, two
        calls = together if half == 0 or 2 * len(one) < self._num_data else (one, one[:half], one[half:])
        runs = tuple(run for run in (self._attempt(rows, values) for rows in calls) if run is not None)
        return runs if len(runs) == len(calls) else None

    def _exchanged(self, one: Tensor, two: Tensor, values: Values) -> tuple[ModelRun, ...]:
        """Runs on (a, c), (a', c'), (c', a) and (c, a')."""
        half = len(one) // 2
        crossed = torch.cat([two[half:], one[:half]]), torch.cat([one[half:], two[:half]])
        return tuple(self._run(rows, values) for rows in (one, two, *crossed))

    def _unlike_exchanged(self, pairs: Sequence[Pair], values: Values) -> Iterator[tuple[ModelRun, ...]]:
        """The same where each batch holds one row alone, of two that are as unlike as can be.

        A model that does something else where a batch leans to one side shows it there.
        """
        for one, two in pairs:
            with contextlib.suppress(Exception):  # a model may fail on batches that it never meets
                yield self._exchanged(one, two, values)

    def full_run(self) -> ModelRun | None:
        """A run on all rows, where that is affordable."""
        is_possible = self._rows.has_all and self._is_affordable(self._rows.num_rows)
        return self._run(torch.arange(self._rows.num_rows), self._points[0]) if is_possible else None

    def _is_affordable(self, num_rows: int) -> bool:
        """Whether so many rows can be run at once."""
        is_small = num_rows * self._rows.row_size <= _MAX_FULL_NUMBERS
        return is_small or num_rows <= _MAX_FULL_BATCHES * self._rows.batch_size

    def check_constant(self, name: str, what: str, *, other_plates: bool = False) -> None:
        """Refuses a site that must not depend on the rows, but does.

        :param other_plates: whether it lies in another plate that subsamples, whose N/B it carries.
        """
        full = self.full
        expected = self._num_data / self._rows.batch_size
        scale = self.runs[0].one.site(name).scale
        if not other_plates and scale is not None and expected != 1 and abs(scale - expected) <= 1e-6 * expected:
            raise ModelError(
                f"{what} '{name}' is scaled by {scale:g}, which is N/B. That belongs to the likelihood alone, and the "
                "kernel scales it: take the site out of poutine.scale."
            )
        for runs in self.runs:
            self._check_equal(name, what, runs.unlike)
        if full is not None:
            self._check_equal(name, what, [self.runs[0].one, full])

    @cached_property
    def full(self) -> ModelRun | None:
        """See :meth:`full_run`; run once."""
        return self.full_run()

    def _check_equal(self, name: str, what: str, runs: list[ModelRun]) -> None:
        first = runs[0].site(name)
        for run in runs[1:]:
            site = run.site(name)
            if site.scale == first.scale and len(site.terms) == len(first.terms):
                if not differs(first.terms, site.terms):
                    continue
            elif not totals_differ(first.total.reshape(1), site.total.reshape(1)):
                continue
            raise ModelError(changing_site_message(name, what, runs[0], run))

    def check_sum(self, name: str, factor: Callable[[int], float] = lambda rows: 1.0) -> None:
        """Refuses an observed site that is not a sum of one term for each row.

        :param factor: what the terms are multiplied by, to compare them between numbers of rows.
        """
        for runs in self.runs:
            self._check_exchanges(name, runs)
            self._check_numbers(name, runs, factor)
        if self._hides_effects(name):
            self._check_gradients(name, self.runs[:_NUM_NEAR], factor)

    def _check_gradients(self, name: str, near: list[Runs], factor: Callable[[int], float]) -> None:
        exchanged = [(runs.exchanges[0][:2], runs.exchanges[0][2:]) for runs in near]
        if self._rows.batch_size > 1 and gradients_differ(self._probe, name, exchanged, factor):
            raise ModelError(not_by_row_message(name, near[0].one.num_rows))
        split = [(runs.splits[0][:1], runs.splits[0][1:]) for runs in near if runs.splits]
        if split and gradients_differ(self._probe, name, split, factor):
            raise ModelError(by_number_message(name, split[0][1][-1].num_rows, split[0][0][0].num_rows))

    def _check_exchanges(self, name: str, runs: Runs) -> None:
        by_row = self._has_term_per_row(runs, name)
        for exchange in runs.exchanges if self._rows.batch_size > 1 else ():
            one, two, *crossed = (run.site(name) for run in exchange)
            if _unequal([(one, 1.0), (two, 1.0)], [(site, 1.0) for site in crossed], by_row):
                raise ModelError(not_by_row_message(name, runs.one.num_rows))

    def _check_numbers(self, name: str, runs: Runs, factor: Callable[[int], float]) -> None:
        def scaled(run: ModelRun) -> tuple[SiteTerms, float]:
            return run.site(name), factor(run.num_rows)

        by_row = self._has_term_per_row(runs, name)
        relations = [([whole], list(parts)) for whole, *parts in runs.splits]
        if runs.one_more:
            few, few_other, more, more_other = runs.one_more
            relations.insert(0, ([more, few_other], [more_other, few]))
        for left, right in relations:
            if _unequal(list(map(scaled, left)), list(map(scaled, right)), by_row):
                raise ModelError(by_number_message(name, right[-1].num_rows, left[0].num_rows))

    def depends_on_rows(self, name: str) -> bool:
        """Whether a site has other terms on other rows, as many of them."""
        is_exact = self._hides_effects(name)
        return any(
            runs.one.site(name).differs(run.site(name), is_exact)
            for runs in self.runs
            for run in runs.all
            if run.num_rows == runs.one.num_rows
        )

    def _hides_effects(self, name: str) -> bool:
        """Whether the terms are so large that effects on them are lost in the rounding."""
        near = self.runs[:_NUM_NEAR]
        return rounding_hides(near[0].one.site(name).terms, near[-1].one.site(name).terms)

    def _has_term_per_row(self, runs: Runs, name: str) -> bool:
        """Whether the number of terms follows the number of rows."""
        other = runs.resized
        if other is None:
            return len(runs.one.site(name).terms) % self._rows.batch_size == 0
        return _is_proportional(len(runs.one.site(name).terms), len(other.site(name).terms), runs.one, other)

    def follows_rows(self, name: str) -> bool:
        """Whether a site scores values for each row; False for one that does not depend on the data.

        :raises ModelError: if it depends on the data in another way.
        """
        for runs in self.runs:
            assert runs.resized is not None
            one, other = runs.one.site(name), runs.resized.site(name)
            if _is_proportional(one.count, other.count, runs.one, runs.resized):
                return True
            others = [run.site(name) for run in runs.all]
            if any(one.count != s.count or one.differs(s) for s in others):
                raise ModelError(
                    f"Observed site '{name}' depends on the data, but its size does not follow the number of rows, so "
                    "its log-likelihood cannot be scaled by N/B. Observe one value for each row, in "
                    "`with pyro.plate('data', len(x))`, or use the full batch."
                )
        return False


def _unequal(left: list[tuple[SiteTerms, float]], right: list[tuple[SiteTerms, float]], by_row: bool) -> bool:
    """Whether terms that should be the same together are not."""
    one, other = (torch.cat([site.terms * scale for site, scale in sites]) for sites in (left, right))
    if by_row and len(one) == len(other):
        return differs(one, other)
    return totals_differ(one, other)


def _is_proportional(count: int, count_more: int, one: ModelRun, more: ModelRun) -> bool:
    return count * more.num_rows == count_more * one.num_rows and count != count_more
