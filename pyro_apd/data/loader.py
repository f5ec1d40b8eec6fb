# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Mini-batches from an iterable of batches, such as a :class:`~torch.utils.data.DataLoader`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torch.utils.data.sampler import BatchSampler, RandomSampler, SequentialSampler

from pyro_apd.data.arguments import check_batch
from pyro_apd.data.collation import items_by_company
from pyro_apd.data.epochs import EpochRows, epoch_of, num_rows
from pyro_apd.data.index_stream import Generators
from pyro_apd.data.minibatch import NUM_PROBED, Call, ProbeRows, RowSubsample, joined
from pyro_apd.data.outside_memory import OutsideMemory
from pyro_apd.errors import DataError
from pyro_apd.runtime.global_state import other_random_states
from pyro_apd.runtime.prefetch import PrefetchQueue, Sender, Transfer, Worker
from pyro_apd.runtime.random_stream import RandomStream
from pyro_apd.runtime.trees import tree_flatten, tree_unflatten

# Marks the end of an epoch.
_END: Any = object()


class LoaderBatches(OutsideMemory):
    """Batches from an iterable, such as a :class:`~torch.utils.data.DataLoader`, epoch after epoch.

    A tuple or list becomes positional arguments of the model, a dict keyword arguments, a tensor its only argument.
    Batches are sent to ``device``. A sized iterable that holds each datum once per epoch scales every batch by the
    number of batches, also a shorter last one: the mean over an epoch is then exact, and a last batch of one row is not
    scaled by N. Batches of other iterables have one size B, apart from a shorter last one, and scale by N/B; after the
    first epoch B is its mean, which is exact, too. At the end of an epoch its rows are counted.

    With ``prefetch``, a thread reads from the second batch of an epoch on. Code in that thread must not draw from the
    global generators of torch, NumPy and Python, which the caller uses, too. So the first batch of each epoch, where
    samplers are seeded, is read in the calling thread. All others are read there, too, if the second one is found to
    draw from them (random crops, for example).

    :param int num_data: N, where the loader does not show it; see :func:`~pyro_apd.data.epochs.epoch_of`.
    :raises ValueError: if N is not known, is not ``num_data``, or rows do not come equally often.
    """

    def __init__(
        self, loader: Iterable[Any], kwargs: Mapping[str, Any], num_data: int | None, device: torch.device | None = None
    ) -> None:
        self._epoch = epoch_of(loader, num_data)
        self.num_data = self._epoch.num_data
        self.device = device
        self._loader, self._kwargs = loader, dict(kwargs)
        self._iterator: Iterator[Any] | None = None
        self._spec: Any = None
        self._tuple_specs: dict[int, Any] = {}  # specs of batches that are tuples of tensors, by length
        # Each worker process may end with a shorter batch.
        self._max_short = max(1, getattr(loader, "num_workers", 0))
        self._rows = EpochRows(self._epoch, 0, self._max_short)
        self._random_state: Tensor | None = None
        self._before_epoch: Tensor | None = None
        self._num_taken = 0
        self._by_chain: list[LoaderBatches] = []
        self._worker = Worker()  # shared by all copies: only one thread reads at a time
        self._queue: PrefetchQueue[Any] = PrefetchQueue(self._worker)
        self._sender = Sender(device)
        self._draws_nothing: bool | None = None
        self._num_read = 0  # batches of this epoch, those that are read ahead included

    def start(self, generators: Generators) -> None:
        """Starts chains. The loader shuffles by a seed from each generator; the global generator is not used."""
        super().start(generators)
        self._worker.wait()
        self._by_chain, self._iterator, self._num_taken = [], None, 0
        self._rows = EpochRows(self._epoch, self._rows.full_rows, self._max_short)
        self._queue, self._sender = PrefetchQueue(self._worker), Sender(self.device)
        self._targets = self._targets.again(self._epoch.num_data)
        if not isinstance(generators, torch.Generator):
            self._by_chain = [copy.copy(self) for _ in generators]
            for source, generator in zip(self._by_chain, generators, strict=True):
                source.watch = None  # they are watched together
                source.start(generator)
            return
        seed = torch.randint(2**62, (), generator=generators, device=generators.device)
        self._random_state = torch.Generator().manual_seed(int(seed)).get_state()

    def close(self) -> None:
        """Ends the reading thread."""
        self._worker.close()

    def state_dict(self) -> dict[str, Any]:
        """The random state before this epoch, the batches taken from it, and the rows per batch of the first one."""
        if self._by_chain:
            return {"by_chain": [source.state_dict() for source in self._by_chain]}
        before = self._random_state if self._iterator is None else self._before_epoch
        return {"before_epoch": before, "num_taken": self._num_taken, "mean_rows": self._rows.mean_rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restarts the epoch and skips the batches that were taken: as expensive as reading these again."""
        for source, source_state in zip(self._by_chain, state.get("by_chain", ()), strict=True):
            source.load_state_dict(source_state)
        if not self._by_chain:
            self._queue.clear()
            self._random_state, self._iterator, self._num_taken = state["before_epoch"], None, 0
            self._rows.restart()
            self._rows.mean_rows = state.get("mean_rows")
            for _ in range(int(state["num_taken"])):
                self._rows.add(num_rows(self._next_batch()) or 0)

    def _draw(self) -> tuple[Tensor, ...]:
        """The tensors of the next batch, flattened.

        :raises DataError: if the iterable is exhausted or a batch holds no tensors.
        :raises: any error of the iterable, also one in the reading thread.
        """
        if self._by_chain:
            batches = [source.draw() for source in self._by_chain]
            self._spec = self._by_chain[0]._spec
            self._rows = self._by_chain[0]._rows
            return _stacked(batches)
        inputs = self._received(*self._next_sent())
        rows = len(inputs[0])
        if not self._covers_once(rows):
            self._rows.check_size(rows)
        self._rows.add(rows)
        return inputs

    def _next_sent(self) -> tuple[Transfer, Any]:
        if self.ahead and self._draws_nothing and self._iterator is not None:
            while len(self._queue) <= self.ahead:
                self._queue.submit(self._read, [(self._iterator,)] * self.at_once, [None] * self.at_once)
            found = self._queue.pop()
            if found is not _END:
                self._num_taken += 1
                return found  # type: ignore[no-any-return]
            self._queue.clear()
            self._end_epoch()
        if self._num_taken != 1 or self._draws_nothing is not None:
            return self._sent(self._next_batch())
        before, others = self._random_state, other_random_states()
        batch = self._next_batch()
        if self._num_taken == 2:
            assert before is not None
            assert self._random_state is not None
            self._draws_nothing = torch.equal(before, self._random_state) and others == other_random_states()
        return self._sent(batch)

    def _read(self, iterator: Iterator[Any]) -> Any:
        """In the thread: the next batch, on its way to the device."""
        batch = next(iterator, _END)
        self._num_read += 1
        return batch if batch is _END else self._sent(batch)

    def _sent(self, batch: Any) -> tuple[Transfer, Any]:
        if type(batch) in (tuple, list) and batch and all(_is_plain(leaf) for leaf in batch):
            if len(batch) not in self._tuple_specs:  # flattening takes as long as reading a small batch
                self._tuple_specs[len(batch)] = tree_flatten(self._as_call(batch))[1]
            self._targets.look(batch, self._place)
            return self._sender.send(batch), self._tuple_specs[len(batch)]
        call = self._as_call(batch)
        check_batch(*call)
        tensors, spec = tree_flatten(call)
        self._targets.look(tensors, self._place)
        return self._sender.send(tensors), spec

    def _place(self, row: int) -> str:
        return f"batch {self._num_read} of an epoch, row {row}"

    def _received(self, sent: Transfer, spec: Any) -> tuple[Tensor, ...]:
        self._spec = spec
        return sent.result()

    def cover(self) -> Iterator[tuple[tuple[Tensor, ...], float]]:
        """One epoch of the iterable.

        :raises ValueError: if an epoch does not hold each datum once.
        """
        self._worker.wait()
        with RandomStream(0):
            batches = [self._received(*self._sent(batch)) for batch in self._loader]
        rows = sum(batch[0].shape[0] for batch in batches)
        if rows != self.num_data:
            raise ValueError(
                f"An epoch of the iterable holds {rows} rows, the data {self.num_data}: batches must cover the data "
                "once. Leave out drop_last=True and samplers that draw with replacement."
            )
        for source in self._by_chain or [self]:
            source._rows.mean_rows = rows / len(batches)
        for batch in batches:
            yield batch, 1 / self.scale(batch)

    def bind(self, inputs: tuple[Tensor, ...]) -> Call:
        """The batch as the model's arguments."""
        call = self.bind_alone(inputs)
        return Call(call.args, {**self._kwargs, **call.kwargs})

    def bind_alone(self, inputs: tuple[Tensor, ...]) -> Call:
        """The same without the arguments that do not change."""
        args, kwargs = tree_unflatten(list(inputs), self._spec)
        return Call(args, kwargs)

    def _bound(self, batch: Any) -> Call:
        return self.bind(self._received(*self._sent(batch)))

    @property
    def epoch_length(self) -> None:
        """None: a loader may draw with replacement. Batches that count as independent lead to smaller steps."""
        return None

    def probe_rows(self, inputs: tuple[Tensor, ...]) -> tuple[ProbeRows, ...]:
        """The rows of the batch ``inputs`` and of a few more, where the iterable can be iterated again."""
        num_rows = inputs[0].shape[0]
        batches = (
            [inputs] if isinstance(self._loader, Iterator) else [inputs, *(self.draw() for _ in range(NUM_PROBED))]
        )
        shapes_differ = len({tuple(tensor.shape[1:] for tensor in batch) for batch in batches}) > 1
        items = items_by_company(self._loader, len(batches), shapes_differ)
        if items is not None:
            batch_of = items.batch
            return (ProbeRows(len(items.items), num_rows, lambda rows: self._bound(batch_of(rows))),)
        call = self.bind(joined(batches))
        pool = RowSubsample(call.args, call.kwargs, 1)
        assert pool.num_data is not None
        (rows,) = pool.probe_rows(inputs)
        return (replace(rows, batch_size=num_rows, has_all=False),)

    def scale(self, inputs: tuple[Tensor, ...]) -> float:
        """N/B, with the average B of an epoch where it is known."""
        rows = inputs[0].shape[0]
        if self._covers_once(rows):
            return float(self._epoch.num_batches or len(self._loader))  # type: ignore[arg-type]
        if self._epoch.is_shown:  # the rows of a shorter last batch are as random as those of others
            return self._epoch.num_data / rows
        return self._epoch.num_data / (self._rows.mean_rows or max(self._rows.full_rows, rows))

    def _covers_once(self, rows: int = 0) -> bool:
        """Whether an epoch holds each of the N rows once, as far as its number of batches shows it."""
        if self._epoch.num_batches is not None:
            return True
        if self._epoch.is_shown or getattr(self._loader, "drop_last", False):
            return False
        try:
            num_batches = len(self._loader)  # type: ignore[arg-type]
        except TypeError:
            return False
        return num_batches == -(-self._epoch.num_data // max(self._rows.full_rows, rows, 1))

    def _next_batch(self) -> Any:
        """The next batch, drawn with the source's own random numbers, where it was started."""
        self._worker.wait()
        if self._random_state is None:
            return self._next_of_epochs(torch.get_rng_state)
        stream = RandomStream(0)
        stream.set_state(self._random_state)
        try:
            with stream:
                return self._next_of_epochs(stream.get_state)
        finally:
            self._random_state = stream.get_state()

    def _next_of_epochs(self, random_state: Callable[[], Tensor]) -> Any:
        for _ in range(2):
            if self._iterator is None:
                self._before_epoch, self._num_taken = random_state(), 0
                self._iterator = _epoch(self._loader)
            try:
                batch = next(self._iterator)
                self._num_taken += 1
                self._num_read = self._num_taken
                return batch
            except StopIteration:
                self._end_epoch()
        raise DataError(
            "The iterable of batches is exhausted. Pass one that can be iterated again, such as a DataLoader or a "
            "list, not an iterator or generator."
        )

    @property
    def own_generators(self) -> list[torch.Generator]:
        """Generators of the loader and its samplers, which each epoch moves on, whatever the source's random state."""
        batch_sampler = getattr(self._loader, "batch_sampler", None)
        parts = (self._loader, getattr(self._loader, "sampler", None), getattr(batch_sampler, "sampler", None))
        generators = [getattr(part, "generator", None) for part in parts]
        return [generator for generator in generators if isinstance(generator, torch.Generator)]

    def _end_epoch(self) -> None:
        self._iterator = None
        self._rows.end(self._covers_once())

    @staticmethod
    def _as_call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(batch, Mapping):
            return (), dict(batch)
        is_sequence = isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence)
        return (tuple(batch), {}) if is_sequence else ((batch,), {})


def _is_plain(leaf: Any) -> bool:
    return type(leaf) is Tensor and leaf.layout is torch.strided and not leaf.is_nested and leaf.dim() > 0


def _stacked(batches: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Batches of C chains as one, with a leading dimension of C."""
    shapes = {tuple(tuple(tensor.shape) for tensor in batch) for batch in batches}
    if len(shapes) > 1:
        raise DataError(
            f"The batches of vectorised chains must have one shape; the loader gave {sorted(shapes)}. Give batches of "
            "equal size, or use chain_method='sequential'."
        )
    return tuple(torch.stack(leaves) for leaves in zip(*batches, strict=True))


def refuse_worker_processes(args: Sequence[Any]) -> None:
    """Raises ValueError if the run's loader has worker processes: a chain's own process cannot start them."""
    num_workers = getattr(args[0], "num_workers", 0) if len(args) == 1 else 0
    if num_workers:
        raise ValueError(
            f"The DataLoader has num_workers={num_workers}, and chain_method='parallel' runs each chain in a process "
            "that cannot start others. Use num_workers=0, or chain_method='vectorized', which reads in this process."
        )


def is_loader(args: Sequence[Any], num_data: int | None) -> bool:
    """Whether the arguments of a run are one iterable of batches, rather than arguments of the model."""
    if len(args) != 1 or isinstance(args[0], (Tensor, np.ndarray, str, bytes, Mapping)):
        return False
    is_iterable = isinstance(args[0], Iterable)
    return isinstance(args[0], (DataLoader, Iterator)) or (is_iterable and num_data is not None)


def _epoch(loader: Iterable[Any]) -> Iterator[Any]:
    """Iterates over a loader. A plain one over tensors is indexed once per batch, which gives the same batches."""
    iterator = iter(loader)
    if (
        type(loader) is not DataLoader
        or type(loader.dataset) is not TensorDataset
        or type(loader.batch_sampler) is not BatchSampler
        or type(loader.sampler) not in (RandomSampler, SequentialSampler)
        or loader.collate_fn is not default_collate
        or loader.num_workers > 0
        or loader.pin_memory
    ):
        return iterator
    # Making the iterator has drawn its random numbers already; the sampler starts at the first batch, as it would.
    tensors = loader.dataset.tensors
    batches = (torch.as_tensor(rows) for rows in loader.batch_sampler)
    return ([tensor.index_select(0, rows.to(tensor.device)) for tensor in tensors] for rows in batches)
