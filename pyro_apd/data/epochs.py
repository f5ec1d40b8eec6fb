# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What an epoch of an iterable of batches shows of the data: the N that its batches are scaled to."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, default_convert
from torch.utils.data.sampler import BatchSampler

from pyro_apd.data.samplers import SampledRows, counted_rows, rows_of_sampler
from pyro_apd.errors import DataError
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
    :ivar int num_items: items of the dataset per epoch; an epoch of so many rows has one for each, and N is wrong. None
        where that is right.
    """

    num_data: int
    num_batches: int | None = None
    num_rows: int | None = None
    num_left_out: int = 0
    is_shown: bool = True
    num_items: int | None = None


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
    if found is not None and num_data != found.num_data and num_data is not None and joins_rows(loader):
        # An item of the dataset may be several rows, or none.
        size = num_data if found.num_batches is not None else None
        return Epoch(num_data, found.num_batches, size, is_shown=False, num_items=found.num_rows)
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
        lengths = [num_rows(batch) for batch in loader]
        known = [length for length in lengths if length is not None]
        return Epoch(sum(known), len(known), sum(known)) if len(known) == len(lengths) else None
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    return _epoch_of_sampler(loader, len(loader.dataset))  # type: ignore[arg-type]


def joins_rows(loader: Iterable[Any]) -> bool:
    """Whether a loader makes batches of its items in a way of its own."""
    return isinstance(loader, DataLoader) and loader.collate_fn not in (default_collate, default_convert)


def num_rows(batch: Any) -> int | None:
    """Rows of a batch, by its first tensor; None where that is none, or has no rows."""
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
        rows = rows_of_sampler(batches.sampler, size)
        epoch = None if rows is None else _in_batches(rows, batches.batch_size, batches.drop_last)
    else:
        rows = counted_rows(batches, size, in_batches=True)
        epoch = None if rows is None else Epoch(rows.num_data, rows.num_items if rows.once else None, rows.num_drawn)
    if epoch is not None and epoch.num_data < size:
        logger.warning(
            "Epochs of the DataLoader draw from %d of the %d rows of its dataset: N = %d.",
            epoch.num_data,
            size,
            epoch.num_data,
        )
    return epoch


def _in_batches(rows: SampledRows, batch_size: int, drop_last: bool) -> Epoch:
    """The epoch of a sampler whose indices are taken ``batch_size`` at a time.

    :raises ValueError: if there is no batch.
    """
    size, drawn = rows.num_data, rows.num_drawn
    if drop_last and drawn is not None and 0 < drawn < batch_size:
        raise ValueError(
            f"The DataLoader has batch_size={batch_size} and drop_last=True, and its epochs draw {drawn} rows: no "
            f"batch is complete. Use a batch_size of at most {drawn}, or leave drop_last out."
        )
    rest = drawn % batch_size if drop_last and drawn is not None else 0
    if drawn is None or not rows.once or (rest and rows.reshuffled):  # each epoch has other rows
        return Epoch(size, None, None if drawn is None else drawn - rest)
    return Epoch(size - rest, -(-(size - rest) // batch_size), size - rest)


def check_rows_of_epoch(epoch: Epoch, num_rows: int, covers_once: bool) -> None:
    """Checks an epoch that has ended.

    :param int num_rows: the rows that it held.
    :param bool covers_once: whether batches were scaled as if it held each row once.
    :raises DataError: if that is not the number that N stands for.
    """
    expected = epoch.num_data if covers_once else epoch.num_rows
    is_by_item = epoch.num_items is not None and num_rows == epoch.num_items
    if expected is None and is_by_item:
        expected = epoch.num_data
    if expected is not None and not expected - epoch.num_left_out <= num_rows <= expected:
        raise DataError(
            f"An epoch of the iterable of batches held {num_rows} rows, where {expected} were expected of "
            f"N = {epoch.num_data}, to which the likelihood was scaled. Pass the number of rows that epochs draw from "
            "as num_data=N to the kernel; where it is that already, give batches that hold each row once per epoch."
        )


class EpochRows:
    """Counts the rows of batches, epoch by epoch, where N/B has to be the same for all batches.

    :param int full_rows: rows of the largest batch that is known already.
    :param int max_short: how many batches of an epoch may be shorter: the last one, of each worker process.
    :ivar int full_rows: rows of the largest batch.
    :ivar mean_rows: rows per batch in the first epoch; None before its end.
    """

    def __init__(self, epoch: Epoch, full_rows: int = 0, max_short: int = 1) -> None:
        self.full_rows, self.mean_rows = full_rows, None  # type: int, float | None
        self._epoch, self._max_short = epoch, max_short
        self._num_rows = self._num_batches = self._num_short = 0

    def restart(self) -> None:
        """An epoch begins."""
        self._num_rows = self._num_batches = self._num_short = 0

    def add(self, rows: int) -> None:
        """A batch of so many rows."""
        self.full_rows = max(self.full_rows, rows)
        self._num_rows += rows
        self._num_batches += 1

    def check_size(self, rows: int) -> None:
        """Checks the size of a batch before it is added, where batches are scaled by N/B.

        :raises DataError: if batches differ in size, apart from a shorter last one.
        """
        if self._num_short >= self._max_short or (self._num_batches and rows > self.full_rows):
            raise DataError(
                f"The batches of an iterable differ in size: {rows} rows after at most {self.full_rows}, with "
                f"{self._num_short} shorter before. Scaled by N over its rows, a row of a small batch counts more than "
                "one of a large batch. Give batches of one size, of which the last one of an epoch may be shorter; a "
                "list of batches; or the DataLoader itself, not an iterator over several of its epochs."
            )
        self._num_short += rows < self.full_rows

    def end(self, covers_once: bool) -> None:
        """The epoch has ended; see :func:`check_rows_of_epoch`."""
        if self._num_rows:
            check_rows_of_epoch(self._epoch, self._num_rows, covers_once)
            self.mean_rows = self.mean_rows or self._num_rows / self._num_batches
        self.restart()
