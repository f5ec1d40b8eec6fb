# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Mini-batches of data that stay where they are: memory-mapped arrays, and whatever gives rows for indices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_apd.data.arguments import argument_name
from pyro_apd.data.index_stream import Generators, batches_per_epoch, index_stream
from pyro_apd.data.loader import is_loader, model_arguments
from pyro_apd.data.minibatch import Call, MinibatchSource, ProbeCalls, check_batch_size, probe_calls_on_parts
from pyro_apd.errors import DataError
from pyro_apd.runtime.prefetch import Ahead, Sender, Sent, Worker
from pyro_apd.runtime.trees import tree_flatten_with_path, tree_leaves, tree_unflatten

# Rows that stand for stored data where somebody asks what the model is called with.
_SHOWN_ROWS = 2000
# They have a length and can be indexed, but not by an array.
_NO_ARRAYS = (Tensor, str, bytes, bytearray, memoryview, range, Mapping, torch.nn.Module)


def is_stored(leaf: Any) -> bool:
    """Whether an argument holds rows outside of memory, or may do: it is read batch by batch.

    Numpy arrays, memory-mapped or not, and any object with ``__len__`` and a ``__getitem__`` that takes an array of
    indices. A tensor never: torch does not say whether a file is behind it, but its ``numpy()`` is an array.
    """
    if isinstance(leaf, np.ndarray):
        return leaf.ndim > 0
    return hasattr(leaf, "__len__") and hasattr(leaf, "__getitem__") and not isinstance(leaf, _NO_ARRAYS)


def has_stored_rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether any argument does."""
    return any(is_stored(leaf) for leaf in tree_leaves((tuple(args), dict(kwargs))))


class RowReader(MinibatchSource):
    """As :class:`~pyro_apd.data.minibatch.RowSubsample`, for arguments that need not be tensors in memory.

    The rows of a batch are read when it is due, or by a thread ``ahead`` batches earlier, and sent to ``device``. Which
    rows they are, and in which order, depends on neither, and is as for tensors in memory of a CPU.

    :param int batch_size: rows a batch.
    :param int num_data: N; by default the length of the first argument that has rows.
    :param bool replacement: see :func:`~pyro_apd.data.index_stream.index_stream`.
    :param device: where batches go; None leaves them on the host.
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
        self.batch_size, self.replacement, self.device = batch_size, replacement, device
        self._worker = Worker()  # one for all copies: nobody else reads while it does
        self._queue: Ahead[Sent] = Ahead(self._worker)
        self._sender = Sender(device)

    def start(self, generators: Generators) -> None:
        """Begins chains with a stream of row indices, which the host draws."""
        assert self.num_data is not None
        one = isinstance(generators, torch.Generator)
        listed = [generators] if isinstance(generators, torch.Generator) else list(generators)
        on_host = [g if g.device.type == "cpu" else torch.Generator().manual_seed(g.initial_seed()) for g in listed]
        super().start(on_host[0] if one else on_host)
        self._worker.settle()
        self._streams = [index_stream(self.num_data, self.batch_size, self._generators, self.replacement)]
        self._queue, self._sender = Ahead(self._worker), Sender(self.device)

    def close(self) -> None:
        """Ends the thread that reads."""
        self._worker.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the batches are that were drawn; those that were only read ahead do not count."""
        before, num_since = self._queue.note if self._queue else (super().state_dict(), 0)
        return {**before, "num_since": num_since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where a source that was started alike stood."""
        self._queue.drop()
        super().load_state_dict(state)
        for _ in range(int(state["num_since"])):
            next(self._streams[0])

    def draw(self) -> tuple[Tensor, ...]:
        """The rows of each argument that has them, ``(B, ...)``, or ``(C, B, ...)`` for C chains.

        :raises DataError: if an argument does not give a row for each index.
        :raises: what reading an argument raises, also where a thread met it.
        """
        if not self.ahead:
            self._worker.settle()
            return self._read(next(self._streams[0])).received()
        while len(self._queue) <= self.ahead:
            before = super().state_dict()
            rows = [(next(self._streams[0]),) for _ in range(self.at_once)]
            self._queue.ask(self._read, rows, [(before, i) for i in range(self.at_once)])
        return self._queue.take().received()

    def cover(self) -> Iterator[tuple[tuple[Tensor, ...], float]]:
        """The rows in order; the last batch may be shorter."""
        assert self.num_data is not None
        for first in range(0, self.num_data, self.batch_size):
            self._worker.settle()
            rows = torch.arange(first, min(first + self.batch_size, self.num_data))
            yield self._read(rows).received(), len(rows) / self.num_data

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

    def probe_calls(self, inputs: tuple[Tensor, ...]) -> ProbeCalls:
        """Calls on parts of the batch ``inputs``."""

        def part(start: int, stop: int) -> Call:
            return self.bind(tuple(tensor[start:stop] for tensor in inputs))

        return probe_calls_on_parts(self.bind(inputs), inputs[0].shape[0], part)

    def scale(self, inputs: tuple[Tensor, ...]) -> float:
        """N/B."""
        assert self.num_data is not None
        return self.num_data / inputs[0].shape[0]

    def _read(self, rows: Tensor) -> Sent:
        index = rows if rows.dim() == 1 else rows.reshape(-1)
        tensors = [_rows_of(self._leaves[i], index, self._names[i]) for i in self._rows_at]
        if index is not rows:
            tensors = [tensor.reshape(*rows.shape, *tensor.shape[1:]) for tensor in tensors]
        return self._sender.send(tensors)


def shown_arguments(
    args: Sequence[Any], kwargs: Mapping[str, Any], num_data: int | None = None
) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """Arguments that the model can be called with, and whether they hold all data.

    The first batch of a loader; of stored data, up to 2,000 rows at even distances.

    :param num_data: the kernel's ``num_data``; where given, any iterable counts as a loader.
    """
    if is_loader(args, num_data):
        return (*model_arguments(args, kwargs, num_data), False)
    if not has_stored_rows(args, kwargs):
        return tuple(args), dict(kwargs), True
    reader = RowReader(args, kwargs, 1, num_data)
    assert reader.num_data is not None
    count = min(_SHOWN_ROWS, reader.num_data)
    call = reader.bind(reader._read(torch.arange(count) * reader.num_data // count).received())
    return call.args, call.kwargs, count == reader.num_data


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
    # In order and each once, as HDF5 asks for; and a disk likes it.
    unique, inverse = np.unique(index.numpy(), return_inverse=True)
    return _as_tensor(leaf[unique], len(unique), name).index_select(0, torch.from_numpy(inverse.reshape(-1)))


def _as_tensor(rows: Any, num_rows: int, name: str) -> Tensor:
    if isinstance(rows, np.ndarray) and not rows.dtype.isnative:
        rows = rows.astype(rows.dtype.newbyteorder("="))
    try:
        tensor = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"Argument {name} of the model gives rows that are no tensor ({type(rows).__name__}: {error}). Indexed by "
            "an array of indices it must give an array of numbers, or a tensor."
        ) from error
    if tensor.dim() == 0 or len(tensor) != num_rows:
        raise DataError(
            f"Argument {name} of the model gives shape {tuple(tensor.shape)} for {num_rows} indices. Indexed by an "
            "array of indices it must give one row for each; for items one by one use a DataLoader."
        )
    return tensor
