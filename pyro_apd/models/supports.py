# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Looks once at every row of the data: each observed value must lie in the support of its likelihood.

A value outside it is scored all the same by most distributions, without an error: a Bernoulli target of 700 counts as
700 successes. There are three ways, by cost:

* Where a site's value is an argument's rows, in a support that is the same for all rows, the argument is checked
  without the model: all rows of what is in memory, and batches from outside memory as they come, until N rows have.
* Other sites, and models with integer inputs, which may be indices of an embedding, are run: on all rows in memory, in
  parts; on the first 1,000 batches of a plate, and of what is outside memory as they come.
* Where a chain has diverged, the model runs on that step's batch.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_apd.data.arguments import argument_name, explain_arguments, explain_sources
from pyro_apd.data.minibatch import Call, MinibatchSource, RowSubsample
from pyro_apd.data.outside_memory import OutsideMemory
from pyro_apd.data.targets import Targets, entrywise
from pyro_apd.errors import DataError, ModelError
from pyro_apd.models.bad_rows import (
    failing_row,
    failure_message,
    inner_mask,
    is_unvalidated,
    likelihood_name,
    refuse_rows,
    support_of,
    table_message,
)
from pyro_apd.models.layout import Layout, is_subsample
from pyro_apd.models.tracing import Site, observed_sites, run_model, subsampled_plates
from pyro_apd.runtime.global_state import seeded
from pyro_apd.runtime.trees import tree_flatten, tree_flatten_with_path, tree_unflatten

logger = logging.getLogger("pyro_apd")

# Values of which at least one lies outside any support but that of all numbers.
_OUTSIDE = (-0.5, 1.5, -7.0, 1e6, float("nan"))
# Rows per part where the model runs on all rows, and batches that are run where they cannot be chosen.
_PART_ROWS = 512
_MAX_BATCHES = 1000
_FAILURES = (IndexError, RuntimeError, ValueError)


def first_run(
    model: Callable[..., Any],
    source: MinibatchSource,
    inputs: tuple[Tensor, ...],
    run: Callable[[Call], poutine.Trace],
    seed: int | None = None,
) -> poutine.Trace:
    """A run of ``model`` on a first batch.

    :param source: of mini-batches, and ``inputs`` one of its batches.
    :param run: runs the model on a call, and checks that all densities are finite.
    :param int seed: of what it draws; by default the global generator gives one.
    :raises DataError: if a value has no finite density; it names row and value, where they are found.
    :raises ModelError: as :func:`~pyro_apd.models.tracing.run_model`.
    """
    call = source.bind(inputs)
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    with pyro.validation_enabled(True):
        try:
            with seeded(seed):
                return run(call)
        except ModelError as error:
            explain_sources(error, call.args, call.kwargs)
            raise
        except DataError as error:
            explain_sources(error, call.args, call.kwargs)
            # By the same seed for the same latents, and rows of the model's own plates.
            with seeded(seed), _keeping_the_error():
                return _masked_run(run, model, call, source.row_numbers(inputs))
            raise
        except (*_FAILURES, TypeError, AttributeError) as error:
            with _plain_runs(), _keeping_the_error():
                _explain_failure(model, call, source.row_numbers(inputs), error)
            explain_arguments(error, call.args, call.kwargs)
            if isinstance(error, IndexError) and isinstance(source, RowSubsample):
                raise DataError(table_message(error)) from error
            raise


def _explain_failure(model: Callable[..., Any], call: Call, rows: Tensor | None, error: Exception) -> None:
    """Raises DataError if a model fails on a single row of a batch.

    :param rows: the numbers of the rows in the full data; None where they are not known.
    """
    batch = RowSubsample(call.args, call.kwargs, 1)
    assert batch.num_data is not None
    places = torch.arange(batch.num_data)
    place, cause = failing_row(lambda part: run_model(model, batch.bind((part,))), places, error)
    where = f"row {place} of the first batch" if rows is None else f"row {int(rows[place])}"
    raise DataError(failure_message(where, cause)) from error


def _masked_run(
    run: Callable[[Call], poutine.Trace], model: Callable[..., Any], call: Call, rows: Tensor | None
) -> poutine.Trace:
    """A run in which values outside the support do not count, as they are masked; Pyro's validation refuses those.

    :raises DataError: if they count.
    """
    with pyro.validation_enabled(False):
        trace = run_model(model, call)
        plates = list(subsampled_plates(trace))
        if rows is not None and len(plates) == 1 and len(trace.nodes[plates[0]]["value"]) != len(rows):
            rows = trace.nodes[plates[0]]["value"]
        sites = observed_sites(trace)
        refuse_rows([sites], rows)
        if all(site["mask"] is None and inner_mask(site["fn"]) is None for site in sites.values()):
            raise RuntimeError("no site is masked")
        return run(call)


@contextmanager
def checked_rows(
    model: Callable[..., Any],
    source: MinibatchSource,
    inputs: tuple[Tensor, ...],
    trace: poutine.Trace,
    runs_all: bool = False,
) -> Iterator[None]:
    """Context in which the structure of a model is examined. The rows of the data are checked before and after it.

    :param source: of mini-batches, and ``inputs`` one of its batches.
    :param trace: a run of the model.
    :param runs_all: run the model on all rows, whatever its arguments show.
    :raises DataError: if a row has a value outside the support, or no finite density; also in place of an error inside,
        if the cause is a row.
    """
    if source.is_full:
        yield
        return
    rows = _Rows(model, source, inputs, trace)
    with _plain_runs(), _keeping_the_error():
        rows.check_targets()
    try:
        yield
    except Exception as error:
        with _plain_runs(), _keeping_the_error():
            rows.explain()
        if isinstance(error, IndexError) and isinstance(source, OutsideMemory):
            raise DataError(failure_message("a batch", error)) from error
        raise
    if rows.need_runs or runs_all:
        with _plain_runs():
            rows.run_all(Layout.from_trace(trace))


def check_batch(model: Callable[..., Any], call: Call, start: Mapping[str, Tensor]) -> None:
    """Checks the batch of a step that failed.

    :param start: values of the latents, constrained.
    :raises DataError: if a row has a value outside the support.
    """
    with _plain_runs(), _keeping_the_error():
        refuse_rows([_observed(run_model(model, call, start), start)], None)


@dataclass(frozen=True)
class _Runs:
    """Runs of a model on chosen rows.

    :ivar start: values of the latents, constrained.
    :ivar pass_through: plates that are given batches of ready rows.
    :ivar unchecked: observed sites that may have any value, by ``validate_args=False``.
    """

    model: Callable[..., Any]
    start: Mapping[str, Tensor]
    pass_through: tuple[str, ...]
    unchecked: frozenset[str] = frozenset()

    def __call__(self, call: Call, values: Mapping[str, Tensor] | None = None) -> dict[str, Site]:
        """The observed sites of a run, by default at the start."""
        leaves = tree_flatten((call.args, call.kwargs))[0]
        count = next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0), 0)
        indices = {name: torch.arange(count) for name in self.pass_through}
        values = self.start if values is None else values
        call = Call(call.args, call.kwargs, {**call.indices, **indices})
        sites = _observed(run_model(self.model, call, values), values)
        return {name: site for name, site in sites.items() if name not in self.unchecked}

    def checking(self, call: Call) -> _Runs:
        """The same without the sites that the model does not want to have checked."""
        with pyro.validation_enabled(True), contextlib.suppress(Exception):
            sites = self(call)
            return replace(self, unchecked=frozenset(name for name in sites if is_unvalidated(sites[name]["fn"])))
        return self


class _Watch:
    """Runs a model on the batches of a source outside memory as they come. It has no reference to the source."""

    def __init__(self, runs: _Runs, points: Sequence[Mapping[str, Tensor]]) -> None:
        self._runs, self._points = runs, points
        self._num_left = _MAX_BATCHES

    def __call__(self, call: Call) -> bool:
        """Checks one batch; returns whether another is to be checked."""
        self._num_left -= 1
        with _plain_runs():
            try:
                refuse_rows((self._runs(call, point) for point in self._points), None)
            except (DataError, ModelError):
                raise
            except _FAILURES as error:
                raise DataError(failure_message("a batch", error)) from error
        return self._num_left > 0


class _Rows:
    """Looks at the rows of a source.

    :ivar bool need_runs: whether the model must run on them.
    """

    def __init__(
        self, model: Callable[..., Any], source: MinibatchSource, inputs: tuple[Tensor, ...], trace: poutine.Trace
    ) -> None:
        self.need_runs = True
        self._source, self._inputs = source, inputs
        self._call = source.bind(inputs)
        latents = {name: site["value"] for name, site in trace.iter_stochastic_nodes() if not is_subsample(site)}
        self._start = {name: value.detach() for name, value in latents.items()}
        runs = _Runs(model, self._start, () if source.plates else tuple(subsampled_plates(trace)))
        self._runs = runs.checking(self._call)

    def check_targets(self) -> None:
        """Checks the arguments that are values of an observed site."""
        sites = self._runs(self._call)
        found = [self._targets_of(name, site) for name, site in sites.items()]
        targets = [target for target in found if target is not None]
        self._source.check_targets(targets, self._call, self._inputs)
        self.need_runs = len(targets) < len(sites) or _has_integers(self._call, {target.leaf for target in targets})

    def run_all(self, layout: Layout) -> None:
        """Runs the model on all rows, with two values of its latents, or has it run on batches as they come."""
        points: list[Mapping[str, Tensor]] = [self._start, layout.constrain(0.1 * layout.unconstrain(self._start))]
        if self._source.rows_in_memory:
            for call, rows in self._parts():
                self._check(call, rows, points)
            return
        if isinstance(self._source, OutsideMemory):
            self._source.watch = _Watch(self._runs, points)

    def explain(self) -> None:
        """Looks for a row that is the cause of a failure."""
        for call, rows in self._parts():
            self._check(call, rows, [self._start])

    def _parts(self) -> Iterator[tuple[Call, Tensor]]:
        """Calls on parts of the rows in memory, and the numbers of these rows."""
        num_rows = self._source.rows_in_memory
        if not self._source.plates:
            # No part has one row alone, which models that squeeze their outputs would not take.
            for rows in torch.arange(num_rows).tensor_split(-(-num_rows // _PART_ROWS)) if num_rows else ():
                yield self._source.call_on(rows), rows
        elif len(self._source.plates) == 1:
            ((_, batch),) = self._source.plates.values()
            for first in itertools.islice(range(0, num_rows, batch), _MAX_BATCHES):
                rows = torch.arange(first, first + batch) % num_rows
                yield self._source.call_on(rows), rows

    def _check(self, call: Call, rows: Tensor, points: Sequence[Mapping[str, Tensor]]) -> None:
        """Runs the model on some rows, at several values of its latents.

        :raises DataError: if the values of a row are outside the support, or the model fails on it.
        """
        try:
            refuse_rows((self._runs(call, point) for point in points), rows)
        except (DataError, ModelError):
            raise
        except _FAILURES as error:
            if self._source.plates:
                raise DataError(failure_message("a batch", error)) from error
            row, cause = failing_row(lambda part: self._runs(self._source.call_on(part)), rows, error)
            raise DataError(failure_message(f"row {row}", cause)) from error

    def _targets_of(self, name: str, site: Site) -> Targets | None:
        """The argument whose rows are the value of ``site``; None where there is none, or its support differs by row.

        That they are equal in one batch is no proof: a model may bring labels into range. So a row gets a value outside
        the support, which the site must show unchanged.
        """
        value, support = torch.as_tensor(site["value"]), support_of(site["fn"])
        if support is None or _depends_on_rows(support) or value.dim() == 0:
            return None
        support = entrywise(support)  # rows may be counted as a dimension of the event
        if (
            site["mask"] is not None
            or inner_mask(site["fn"]) is not None
            or support.check(value).shape[:1] != value.shape[:1]
        ):
            return None
        paths_leaves, spec = tree_flatten_with_path((self._call.args, self._call.kwargs))
        leaves = [leaf for _, leaf in paths_leaves]
        for i, leaf in enumerate(leaves):
            rows = _rows_shown(leaf, self._call, len(value))
            if rows is None or not _is_equal(leaf[rows], value):
                continue
            changed = leaf.clone()
            changed[rows[0]] = _value_outside(support, leaf.dtype, value)
            args, kwargs = tree_unflatten([*leaves[:i], changed, *leaves[i + 1 :]], spec)
            try:
                again = self._runs(Call(args, kwargs, self._call.indices))[name]
            except (DataError, ModelError, RuntimeError, ValueError, IndexError):
                continue  # the model looks at its targets; they are checked by running it
            if _is_equal(changed[rows], torch.as_tensor(again["value"])):
                argument = argument_name(paths_leaves[i][0])
                likelihood = likelihood_name(site["fn"])
                return Targets(name, argument, i, support, likelihood, tuple(value.shape[1:]), value.dtype)
        return None


def _rows_shown(leaf: Any, call: Call, count: int) -> Tensor | None:
    """The rows of an argument that a call may show; None where there are not ``count``."""
    if not isinstance(leaf, Tensor) or leaf.dim() == 0:
        return None
    for indices in call.indices.values():
        if len(indices) == count and len(leaf) > int(indices.max()):
            return indices.to(leaf.device)
    return torch.arange(count, device=leaf.device) if len(leaf) == count else None


def _is_equal(rows: Tensor, value: Tensor) -> bool:
    if rows.numel() != value.numel() or len(rows) != len(value):
        return False
    return torch.allclose(rows.to(value.dtype).reshape(value.shape), value, rtol=0, atol=0, equal_nan=True)


def _value_outside(support: Constraint, dtype: torch.dtype, value: Tensor) -> Tensor:
    """A value outside the support that ``dtype`` holds; any where all that it holds are inside."""
    if dtype.is_floating_point:
        held = torch.tensor(_OUTSIDE, dtype=dtype)
    elif dtype == torch.bool:
        held = torch.tensor([True])
    else:
        limits = torch.iinfo(dtype)
        held = torch.tensor([limits.min, limits.max, limits.max // 2], dtype=dtype)
    candidates: list[Tensor] = list(held)
    for number in candidates:
        if not bool(support.check(number.to(value.dtype).expand(value.shape)).all()):
            return number
    return candidates[0]


def _depends_on_rows(support: Constraint) -> bool:
    parts = [part for part in vars(support).values() if isinstance(part, (Tensor, Constraint))]
    return any(_depends_on_rows(part) if isinstance(part, Constraint) else part.numel() > 1 for part in parts)


def _has_integers(call: Call, targets: set[int]) -> bool:
    """Whether an argument that is no target holds integers, which may be indices."""
    leaves = tree_flatten((call.args, call.kwargs))[0]
    others = [leaf for i, leaf in enumerate(leaves) if i not in targets and isinstance(leaf, Tensor) and leaf.dim() > 0]
    return any(not leaf.is_floating_point() and leaf.dtype != torch.bool for leaf in others)


@contextmanager
def _plain_runs() -> Iterator[None]:
    """Context for runs without gradients and validation."""
    with torch.no_grad(), pyro.validation_enabled(False):
        yield


def _observed(trace: poutine.Trace, values: Mapping[str, Tensor]) -> dict[str, Site]:
    """The observed sites; a latent that was given its value counts as observed in a trace, too."""
    return {name: site for name, site in observed_sites(trace).items() if name not in values}


@contextmanager
def _keeping_the_error() -> Iterator[None]:
    """A failure to find a row must not hide the error that it was looked for."""
    try:
        yield
    except DataError:
        raise
    except Exception as failure:
        logger.debug("No row found: %s", failure)
