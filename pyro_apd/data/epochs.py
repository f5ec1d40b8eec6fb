# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What an epoch of an iterable of batches shows of the data: the N that its batches are scaled to."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, default_convert
from torch.utils.data.sampler import (
    BatchSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from pyro_apd.data.index_stream import MAX_EPOCH_ROWS
from pyro_apd.errors import DataError
from pyro_apd.runtime.global_state import seeded
from pyro_apd.runtime.trees import tree_leaves

logger = logging.getLogger("pyro_apd")


@dataclass(frozen=True)
class Epoch:
    """What an epoch shows of the data.

    :ivar int num_data: N, the rows that epochs draw from.
    :ivar int num_batches: of an epoch that holds each of the N rows once; None where it does not, or is not known to.
    :ivar int num_rows: rows that an epoch must hold, or N is wrong; None where any number is right.
    :ivar int num_left_out: how many fewer it may hold.
    :ivar bool is_shown: whether the loader shows which rows it draws; of others only the number of batches is known.
    """

    num_data: int
    num_batches: int | None = None
    num_rows: int | None = None
    num_left_out: int = 0
    is_shown: bool = True


@dataclass(frozen=True)
class _Rows:
    """The rows that a sampler draws from.

    :ivar int num_data: how many there are.
    :ivar bool once: whether an epoch holds each of them once.
    :ivar reshuffled: whether each epoch has another order; None where that is not known.
    """

    num_data: int
    once: bool
    reshuffled: bool | None


def epoch_of(loader: Iterable[Any], num_data: int | None) -> Epoch:
    """What an epoch of ``loader`` shows of the data.

    N is the number of rows that the epochs of a :class:`~torch.utils.data.DataLoader` draw from, by its sampler, and of
    a list of batches that of their rows. It is taken from ``num_data`` for other iterables, and for samplers of other
    types whose epoch does not hold each row of the dataset once.

    :param int num_data: N as the user states it; None where it is not stated.
    :raises ValueError: if N is not known, is not as stated, or rows do not come equally often.
    """
    found = _known(loader)
    if found is not None and found.num_data == 0:
        raise ValueError(f"The {type(loader).__name__} holds no rows: there are no data to learn from.")
    if found is not None and num_data != found.num_data and num_data is not None and _joins_rows(loader):
        found = None  # an item of the dataset may be several rows
    if found is None:
        size = num_data if num_data is not None else _size_of_dataset(loader)
        if size is None:
            raise ValueError(
                "The number of data behind an iterable of batches is not known, so the likelihood of a batch "
                f"cannot be scaled to the full data{_reason(loader)}. Pass num_data=N to the kernel."
            )
        if num_data is not None:
            return Epoch(size, is_shown=False)
        return Epoch(size, None, size, _num_left_out(loader), is_shown=False)
    if num_data is not None and num_data != found.num_data:
        raise ValueError(
            f"num_data={num_data}, but the epochs of the {type(loader).__name__} draw from {found.num_data} rows, so "
            f"that the others are never seen. Leave num_data out for the posterior of these {found.num_data} rows, or "
            "give an iterable that holds all rows."
        )
    return found


def _known(loader: Iterable[Any]) -> Epoch | None:
    """The epoch of a loader that shows its rows; None for others."""
    if isinstance(loader, (list, tuple)):
        lengths = [_num_rows(batch) for batch in loader]
        known = [length for length in lengths if length is not None]
        return Epoch(sum(known), len(known), sum(known)) if len(known) == len(lengths) else None
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    return _epoch_of_sampler(loader, len(loader.dataset))  # type: ignore[arg-type]


def _joins_rows(loader: Iterable[Any]) -> bool:
    """Whether a loader makes batches of its items in a way of its own."""
    return isinstance(loader, DataLoader) and loader.collate_fn not in (default_collate, default_convert)


def _num_rows(batch: Any) -> int | None:
    leaf = next(iter(tree_leaves(batch)), None)
    return len(leaf) if isinstance(leaf, Tensor) and leaf.dim() > 0 else None


def _size_of_dataset(loader: Iterable[Any]) -> int | None:
    if isinstance(loader, DataLoader) and _batches_of_indices(loader) is None:
        return None  # items of the dataset are batches, or its sampler was not understood
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        return None
    try:
        return len(loader.dataset)  # type: ignore[attr-defined]
    except (AttributeError, TypeError, NotImplementedError):
        return None


def _num_left_out(loader: Iterable[Any]) -> int:
    """How many rows of an iterable dataset an epoch may leave out: incomplete batches, one per worker."""
    if not getattr(loader, "drop_last", False):
        return 0
    batch_size, workers = getattr(loader, "batch_size", None), getattr(loader, "num_workers", 0)
    return ((batch_size or 1) - 1) * max(workers, 1)


def _reason(loader: Iterable[Any]) -> str:
    """Why a DataLoader does not show N."""
    if not isinstance(loader, DataLoader):
        return ""
    batches = _batches_of_indices(loader)
    if batches is None:
        return " (batch_size=None: an item of the dataset is a batch)"
    if isinstance(loader.dataset, IterableDataset):
        return " (its dataset is iterable, without a length)"
    sampler = batches.sampler if type(batches) is BatchSampler else batches
    return f" (an epoch of {type(sampler).__name__} does not hold each row of the dataset once)"


def _batches_of_indices(loader: DataLoader[Any]) -> Iterable[Any] | None:
    """What gives the loader the indices of a batch; None where its dataset gives whole batches."""
    if loader.batch_sampler is not None:
        return loader.batch_sampler
    return loader.sampler if isinstance(loader.sampler, BatchSampler) else None


def _epoch_of_sampler(loader: DataLoader[Any], size: int) -> Epoch | None:
    """The epoch of a loader of ``size`` items that are taken by their indices."""
    batches = _batches_of_indices(loader)
    if batches is None:
        return None
    if type(batches) is BatchSampler:
        rows = _rows_of(batches.sampler, size)
        epoch = None if rows is None else _in_batches(rows, batches.batch_size, batches.drop_last)
    else:
        listed = _listed_indices(batches, size)
        epoch = None
        if listed is not None and _holds_each_once(np.concatenate([np.empty(0, int), *listed]), size):
            epoch = Epoch(size, len(listed), size)
    if epoch is not None and epoch.num_data < size:
        logger.warning(
            "Epochs of the DataLoader draw from %d of the %d rows of its dataset: N = %d.",
            epoch.num_data,
            size,
            epoch.num_data,
        )
    return epoch


def _in_batches(rows: _Rows, batch_size: int, drop_last: bool) -> Epoch | None:
    """The epoch of a sampler whose indices are taken ``batch_size`` at a time; None where it is not known."""
    size, rest = rows.num_data, rows.num_data % batch_size if drop_last else 0
    if not rows.once:
        return Epoch(size)
    if rest == 0:
        return Epoch(size, -(-size // batch_size), size)
    if rows.reshuffled is None:
        return None
    if rows.reshuffled:  # each epoch leaves out other rows
        return Epoch(size, None, size - rest)
    return Epoch(size - rest, size // batch_size, size - rest)


def _rows_of(sampler: Iterable[Any], size: int) -> _Rows | None:
    """The rows that a sampler draws from, out of a dataset of ``size``; None where that is not known.

    :raises ValueError: if it does not draw all of them equally often.
    """
    if type(sampler) is SequentialSampler:
        return _Rows(len(sampler.data_source), once=True, reshuffled=False)
    if type(sampler) is RandomSampler:
        count = len(sampler.data_source)
        return _Rows(count, once=not sampler.replacement and sampler.num_samples == count, reshuffled=True)
    if type(sampler) is SubsetRandomSampler:
        return replace(_rows_of_list(sampler.indices), reshuffled=True)
    if isinstance(sampler, WeightedRandomSampler):
        return _rows_of_weights(sampler)
    if isinstance(sampler, (list, tuple, range, np.ndarray, Tensor)):
        return _rows_of_list(sampler)
    listed = _listed_indices(sampler, size)
    if listed is not None and _holds_each_once(np.concatenate([np.empty(0, int), *listed]), size):
        return _Rows(size, once=True, reshuffled=None)
    return None


def _rows_of_weights(sampler: WeightedRandomSampler) -> _Rows:
    weights, count = sampler.weights, len(sampler.weights)
    if float(weights.min()) != float(weights.max()):
        raise ValueError(
            "The DataLoader has a WeightedRandomSampler, so that some rows come more often than others: the posterior "
            "would be that of other data. Use RandomSampler(dataset, replacement=True); to weight the likelihood of "
            "rows, give the model their weights and use pyro.poutine.scale(scale=weights) around its observed site."
        )
    return _Rows(count, once=not sampler.replacement and sampler.num_samples == count, reshuffled=True)


def _rows_of_list(indices: Sequence[int] | np.ndarray | Tensor) -> _Rows:
    array = np.asarray(indices).reshape(-1)
    values, counts = np.unique(array, return_counts=True)
    if len(values) < len(array):
        worst = int(counts.argmax())
        raise ValueError(
            f"The sampler's indices hold row {int(values[worst])} {int(counts[worst])} times: it would count as so "
            "many data. Leave out what is repeated; where repetition is meant, use a dataset that has it, "
            "torch.utils.data.Subset(dataset, indices) with shuffle=True."
        )
    return _Rows(len(array), once=True, reshuffled=False)


def _listed_indices(sampler: Iterable[Any], size: int) -> list[np.ndarray] | None:
    """What one pass over a sampler of another type gives; None where it is too long, or gives no indices."""
    if size > MAX_EPOCH_ROWS:
        return None
    with _preserved_random_states():
        listed = list(itertools.islice(sampler, size + 1))
    try:
        arrays = [np.asarray(item, dtype=np.int64).reshape(-1) for item in listed]
    except (TypeError, ValueError):
        return None
    return arrays if len(arrays) <= size else None


def _holds_each_once(indices: np.ndarray, size: int) -> bool:
    return len(indices) == size and bool((np.sort(indices) == np.arange(size)).all())


@contextmanager
def _preserved_random_states() -> Iterator[None]:
    """Context that leaves the global generators of torch, NumPy and Python as they were."""
    states = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with seeded(0):
            yield
    finally:
        np.random.set_state(states[0])  # noqa: NPY002
        random.setstate(states[1])


def check_rows_of_epoch(epoch: Epoch, num_rows: int, covers_once: bool) -> None:
    """Checks an epoch that has ended.

    :param int num_rows: the rows that it held.
    :param bool covers_once: whether batches were scaled as if it held each row once.
    :raises DataError: if that is not the number that N stands for.
    """
    expected = epoch.num_data if covers_once else epoch.num_rows
    if expected is not None and not expected - epoch.num_left_out <= num_rows <= expected:
        raise DataError(
            f"An epoch of the iterable of batches held {num_rows} rows, where {expected} were expected of "
            f"N = {epoch.num_data}, to which the likelihood was scaled. Pass the number of rows that epochs draw from "
            "as num_data=N to the kernel; where it is that already, give batches that hold each row once per epoch."
        )
