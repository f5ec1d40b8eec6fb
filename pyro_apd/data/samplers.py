# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Which rows of a dataset a sampler draws, and that it draws them equally often."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data.sampler import RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

from pyro_apd.data.index_stream import MAX_EPOCH_ROWS
from pyro_apd.runtime.global_state import seeded

# Draws by which the rows of a sampler of another type are counted: in all, and for each row, fewer of many rows.
_MIN_DRAWS, _MAX_DRAWS = 10_000, 1_000_000
_DRAWS_PER_ROW, _MIN_DRAWS_PER_ROW = 10, 3
# Epochs in which a part of the rows must be the same part.
_NUM_EPOCHS = 5
_ADVICE = (
    "the posterior would be that of other data. Use shuffle=True, or RandomSampler(dataset, replacement=True); to "
    "weight the likelihood of rows, give the model their weights and use pyro.poutine.scale(scale=weights) around its "
    "observed site."
)


@dataclass(frozen=True)
class SampledRows:
    """The rows that a sampler draws from.

    :ivar int num_data: how many there are.
    :ivar bool once: whether an epoch holds each of them once.
    :ivar bool reshuffled: whether each epoch has another order.
    :ivar int num_drawn: rows per epoch; None where it is not always the same.
    :ivar int num_items: indices, or lists of indices, per epoch; as many as rows by default.
    """

    num_data: int
    once: bool
    reshuffled: bool
    num_drawn: int | None
    num_items: int | None = None


def rows_of_sampler(sampler: Iterable[Any], size: int) -> SampledRows | None:
    """The rows that a sampler draws from, out of a dataset of ``size``; None where that is not known.

    :raises ValueError: if it does not draw all of them equally often.
    """
    if type(sampler) is SequentialSampler:
        return _all_once(len(sampler.data_source))
    if type(sampler) is RandomSampler:
        return _random(len(sampler.data_source), sampler.num_samples, sampler.replacement)
    if type(sampler) is SubsetRandomSampler:
        return replace(_rows_of_list(sampler.indices), reshuffled=True)
    if isinstance(sampler, WeightedRandomSampler):
        if float(sampler.weights.min()) != float(sampler.weights.max()):
            raise ValueError(f"The DataLoader has a WeightedRandomSampler, and some rows come more often: {_ADVICE}")
        return _random(len(sampler.weights), sampler.num_samples, sampler.replacement)
    if isinstance(sampler, (list, tuple, range, np.ndarray, Tensor)):
        return _rows_of_list(sampler)
    return counted_rows(sampler, size)


def _all_once(size: int) -> SampledRows:
    return SampledRows(size, once=True, reshuffled=False, num_drawn=size)


def _random(size: int, num_drawn: int, replacement: bool) -> SampledRows:
    return SampledRows(size, once=not replacement and num_drawn == size, reshuffled=True, num_drawn=num_drawn)


def _rows_of_list(indices: Sequence[int] | np.ndarray | Tensor) -> SampledRows:
    array = np.asarray(indices).reshape(-1)
    values, counts = np.unique(array, return_counts=True)
    if len(values) < len(array):
        worst = int(counts.argmax())
        raise ValueError(
            f"The sampler's indices hold row {int(values[worst])} {int(counts[worst])} times: it would count as so "
            "many data. Leave out what is repeated; where repetition is meant, use a dataset that has it, "
            "torch.utils.data.Subset(dataset, indices) with shuffle=True."
        )
    return _all_once(len(array))


def counted_rows(sampler: Iterable[Any], size: int, in_batches: bool = False) -> SampledRows | None:
    """The rows that a sampler of another type draws, as some epochs show it.

    :param int size: rows of its dataset.
    :param bool in_batches: whether it gives lists of indices.
    :returns: None where it cannot be found out: it is too long, can be iterated once only, or gives no indices.
    :raises ValueError: if it draws rows unequally often.
    """
    if not 0 < size <= MAX_EPOCH_ROWS or isinstance(sampler, Iterator):
        return None
    with preserved_random_states():
        first = _epoch(sampler, size, in_batches)
        if first is None or first.rows.size == 0:
            return None
        counts = np.bincount(first.rows, minlength=size)
        if first.has_ended and counts.max() == 1:
            is_whole = len(first.rows) == size
            others = [_epoch(sampler, size, in_batches) for _ in range(1 if is_whole else _NUM_EPOCHS)]
            if is_whole or all(other is not None and _have_same_rows(first, other) for other in others):
                same = others[0] is not None and np.array_equal(first.rows, others[0].rows)
                return SampledRows(len(first.rows), True, not same, len(first.rows), first.num_items)
        num_drawn: int | None = len(first.rows) if first.has_ended else None
        while counts.sum() < max(_MIN_DRAWS, min(_DRAWS_PER_ROW * size, _MAX_DRAWS), _MIN_DRAWS_PER_ROW * size):
            other = _epoch(sampler, size, in_batches)
            if other is None or other.rows.size == 0:
                return None
            counts += np.bincount(other.rows, minlength=size)
            num_drawn = num_drawn if len(other.rows) == num_drawn else None
    _refuse_unequal(counts, type(sampler).__name__)
    return SampledRows(size, False, True, num_drawn, first.num_items)


def _refuse_unequal(counts: np.ndarray, name: str) -> None:
    """Raises ValueError if rows were drawn unequally often.

    Of independent draws of equal probability the statistic has a distribution close to chi-square with as many degrees
    of freedom as rows, and exceeds this bound once in 10^9 cases; of rows in turn it is smaller.
    """
    expected = counts.mean()
    statistic = float(((counts - expected) ** 2).sum() / expected)
    if statistic > len(counts) + 8 * (2 * len(counts)) ** 0.5 + 40:
        most, least = int(counts.argmax()), int(counts.argmin())
        raise ValueError(
            f"{name} draws rows unequally often: of {int(counts.sum())} draws {int(counts[most])} were row {most} and "
            f"{int(counts[least])} row {least}, where about {expected:.0f} are expected. Rows that come more often "
            f"count as more data: {_ADVICE}"
        )


@dataclass(frozen=True)
class _Listed:
    """What one pass over a sampler gave: all its rows ``(n,)``, the number of items, and whether it came to an end."""

    rows: np.ndarray
    num_items: int
    has_ended: bool


def _epoch(sampler: Iterable[Any], size: int, in_batches: bool) -> _Listed | None:
    """One pass, up to ten times ``size`` items; None where these are no indices of the dataset."""
    limit = _DRAWS_PER_ROW * size
    listed = list(itertools.islice(sampler, limit + 1))
    try:
        rows = np.concatenate([_indices(batch) for batch in listed]) if in_batches and listed else _indices(listed)
    except (TypeError, ValueError, RuntimeError):
        return None
    if len(rows) == 0:
        return _Listed(np.empty(0, np.int64), len(listed), True)
    is_index = rows.ndim == 1 and rows.dtype.kind in "iu" and bool(((rows >= 0) & (rows < size)).all())
    return _Listed(rows, len(listed), len(listed) <= limit) if is_index else None


def _indices(items: Sequence[Any] | Tensor) -> np.ndarray:
    """A batch of indices as an array, in one step for indices of any type."""
    if isinstance(items, (list, tuple)) and items and isinstance(items[0], Tensor):
        items = torch.stack(list(items))
    return np.asarray(items)


def _have_same_rows(one: _Listed, other: _Listed) -> bool:
    return np.array_equal(np.sort(one.rows), np.sort(other.rows))


@contextmanager
def preserved_random_states(seed: int = 0) -> Iterator[None]:
    """Context with ``seed`` for the generators of torch, NumPy and Python, which are as before at its end."""
    states = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with seeded(seed):
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            yield
    finally:
        np.random.set_state(states[0])  # noqa: NPY002
        random.setstate(states[1])
