# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Mini-batches of data outside memory: memory-mapped arrays, and any object that gives rows for indices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_apd.data.arguments import argument_name
from pyro_apd.data.index_stream import Generators, batches_per_epoch, index_stream
from pyro_apd.data.minibatch import NUM_PROBED, Call, ProbeRows, check_batch_size, joined
from pyro_apd.data.outside_memory import OutsideMemory
from pyro_apd.errors import DataError
from pyro_apd.runtime.prefetch import PrefetchQueue, Sender, Transfer, Worker
from pyro_apd.runtime.trees import tree_flatten_with_path, tree_leaves, tree_unflatten

# Types that have a length and can be indexed, but not by an array.
_NO_ARRAYS = (Tensor, str, bytes, bytearray, memoryview, range, Mapping, torch.nn.Module)


def is_stored(leaf: Any) -> bool:
    """Whether an argument may hold rows outside memory, so that it is read batch by batch.

    That is so for NumPy arrays, memory-mapped or not, and for any object with ``__len__`` and a ``__getitem__`` that
    takes an array of indices. It is never so for a tensor: torch does not say whether a file backs it; pass its
    ``numpy()``.
    """
    if isinstance(leaf, np.ndarray):
        return leaf.ndim > 0
    return hasattr(leaf, "__len__") and hasattr(leaf, "__getitem__") and not isinstance(leaf, _NO_ARRAYS)


def has_stored_rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether any argument is stored, in the sense of :func:`is_stored`."""
    return any(is_stored(leaf) for leaf in tree_leaves((tuple(args), dict(kwargs))))


class RowReader(OutsideMemory):
    """As :class:`~pyro_apd.data.minibatch.RowSubsample`, for arguments that need not be tensors in memory.

    The rows of a batch are read when it is due, or by a thread ``ahead`` batches earlier, and sent to ``device``. The
    rows and their order are the same in both cases, and the same as for tensors in memory of a CPU.

    :param int batch_size: rows per batch.
    :param int num_data: N; by default the length of the first argument that has rows.
    :param bool replacement: see :func:`~pyro_apd.data.index_stream.index_stream`.
    :param device: where batches are sent; None leaves them on the host.
    :raises ValueError: if ``batch_size`` or ``num_data`` does not fit.
    """

    def __init__(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        batch_size: int,
        num_data: int | None = None,
        replacement: bool = False,
        device: torch.device | None = None,
    ) -> None:
        paths_leaves, self._spec = tree_flatten_with_path((tuple(args), dict(kwargs)))
        self._leaves = [leaf for _, leaf in paths_leaves]
        lengths = [_num_rows(leaf) for leaf in self._leaves]
        self.num_data = next((length for length in lengths if length), None) if num_data is None else num_data
        self._rows_at = [i for i, length in enumerate(lengths) if length == self.num_data]
        if self.num_data is None or not self._rows_at:
            raise ValueError(
                f"No argument has num_data={num_data} rows; those with rows have {[*filter(None, lengths)]}."
            )
        self._names = {i: argument_name(paths_leaves[i][0]) for i in self._rows_at}
        check_batch_size(batch_size, self.num_data)
        self.batch_size = batch_size
        self.replacement = replacement
        self.device = device
        self._worker = Worker()  # shared by all copies: only one thread reads at a time
        self._queue: PrefetchQueue[Transfer] = PrefetchQueue(self._worker)
        self._sender = Sender(device)
        self._last_rows: Tensor | None = None

    def start(self, generators: Generators) -> None:
        """Starts chains with a stream of row indices, which are drawn on the host."""
        assert self.num_data is not None
        one = isinstance(generators, torch.Generator)
        listed = [generators] if isinstance(generators, torch.Generator) else list(generators)
        on_host = [g if g.device.type == "cpu" else torch.Generator().manual_seed(g.initial_seed()) for g in listed]
        super().start(on_host[0] if one else on_host)
        self._worker.wait()
        self._streams = [index_stream(self.num_data, self.batch_size, self._generators, self.replacement)]
        self._queue, self._sender = PrefetchQueue(self._worker), Sender(self.device)
        self._targets = self._targets.again(self.num_data * len(listed))

    def close(self) -> None:
        """Ends the reading thread."""
        self._worker.close()

    def state_dict(self) -> dict[str, Any]:
        """The position after the batches that were drawn; batches that were only read ahead do not count."""
        before, num_since = self._queue.next_tag if self._queue else (super().state_dict(), 0)
        return {**before, "num_since": num_since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the position of a source that was started in the same way."""
        self._queue.clear()
        super().load_state_dict(state)
        for _ in range(int(state["num_since"])):
            next(self._streams[0])

    def _draw(self) -> tuple[Tensor, ...]:
        """The rows of each argument that has them, ``(B, ...)``, or ``(C, B, ...)`` for C chains.

        :raises DataError: if an argument does not give a row for each index.
        :raises: any error of reading an argument, also one in the reading thread.
        """
        if not self.ahead:
            self._worker.wait()
            return self._read(next(self._streams[0])).result()
        while len(self._queue) <= self.ahead:
            before = super().state_dict()
            rows = [(next(self._streams[0]),) for _ in range(self.at_once)]
            self._queue.submit(self._read, rows, [(before, i) for i in range(self.at_once)])
        return self._queue.pop().result()

    def spread_rows(self, count: int) -> Call:
        """A call on ``count`` evenly spaced rows."""
        assert self.num_data is not None
        return self.bind(self._read(torch.arange(count) * self.num_data // count).result())

    def row_numbers(self, inputs: tuple[Tensor, ...]) -> Tensor | None:
        """Of the batch that was read last, unless a thread reads ahead."""
        return None if self.ahead else self._last_rows

    def cover(self) -> Iterator[tuple[tuple[Tensor, ...], float]]:
        """The rows in order; the last batch may be shorter."""
        assert self.num_data is not None
        for first in range(0, self.num_data, self.batch_size):
            self._worker.wait()
            rows = torch.arange(first, min(first + self.batch_size, self.num_data))
            yield self._read(rows).result(), len(rows) / self.num_data

    def bind(self, inputs: tuple[Tensor, ...]) -> Call:
        """The arguments, each with N rows replaced by those of the batch."""
        leaves = list(self._leaves)
        for i, rows in zip(self._rows_at, inputs, strict=True):
            leaves[i] = rows
        args, kwargs = tree_unflatten(leaves, self._spec)
        return Call(args, kwargs)

    @property
    def epoch_length(self) -> int | None:
        """See :func:`~pyro_apd.data.index_stream.batches_per_epoch`."""
        assert self.num_data is not None
        return batches_per_epoch(self.num_data, self.batch_size, self.replacement)

    def probe_rows(self, inputs: tuple[Tensor, ...]) -> tuple[ProbeRows, ...]:
        """The rows of the batch ``inputs`` and of a few more."""
        pool = joined([inputs, *(self.draw() for _ in range(NUM_PROBED))])

        def call(rows: Tensor) -> Call:
            return self.bind(tuple(tensor.index_select(0, rows.to(tensor.device)) for tensor in pool))

        return (ProbeRows(pool[0].shape[0], self.batch_size, call),)

    def scale(self, inputs: tuple[Tensor, ...]) -> float:
        """N/B."""
        assert self.num_data is not None
        return self.num_data / inputs[0].shape[0]

    def _read(self, rows: Tensor) -> Transfer:
        index = self._last_rows = rows if rows.dim() == 1 else rows.reshape(-1)
        tensors = [_rows_of(self._leaves[i], index, self._names[i]) for i in self._rows_at]
        self._targets.look(tensors, lambda row: f"row {int(index[row])}")
        if index is not rows:
            tensors = [tensor.reshape(*rows.shape, *tensor.shape[1:]) for tensor in tensors]
        return self._sender.send(tensors)


def _num_rows(leaf: Any) -> int | None:
    if isinstance(leaf, Tensor):
        return leaf.shape[0] if leaf.dim() > 0 else None
    return len(leaf) if is_stored(leaf) else None


def _rows_of(leaf: Any, index: Tensor, name: str) -> Tensor:
    """Rows of one argument at ``index`` ``(n,)``, on the host unless it is a tensor elsewhere."""
    if isinstance(leaf, Tensor):
        return leaf.index_select(0, index if leaf.device == index.device else index.to(leaf.device))
    if isinstance(leaf, np.ndarray):
        return _as_tensor(np.take(leaf, index.numpy(), axis=0), len(index), name)
    # Sorted and without repetition: HDF5 requires it, and disks read faster.
    unique, inverse = np.unique(index.numpy(), return_inverse=True)
    return _as_tensor(leaf[unique], len(unique), name).index_select(0, torch.from_numpy(inverse.reshape(-1)))


def _as_tensor(rows: Any, num_rows: int, name: str) -> Tensor:
    if isinstance(rows, np.ndarray) and not rows.dtype.isnative:
        rows = rows.astype(rows.dtype.newbyteorder("="))
    try:
        tensor = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"Argument {name} of the model gives rows that cannot be made a tensor ({type(rows).__name__}: {error}). "
            "Indexed by an array of indices it must give an array of numbers, or a tensor; for items one by one use a "
            "DataLoader."
        ) from error
    if tensor.dim() == 0 or len(tensor) != num_rows:
        raise DataError(
            f"Argument {name} of the model gives shape {tuple(tensor.shape)} for {num_rows} indices. Indexed by an "
            "array of indices it must give one row for each; for items one by one use a DataLoader."
        )
    return tensor
