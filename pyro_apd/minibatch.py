# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Where mini-batches come from: the model's own plates, rows of full tensors, or an iterable of batches.

A source answers two questions at every step: which tensors change (:meth:`MinibatchSource.draw`), and what the model
is then called with (:meth:`MinibatchSource.bind`). Keeping them apart lets the potential be traced once, as a function
of the tensors that change.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from pyro_apd.arguments import argument_name
from pyro_apd.errors import DataError


@dataclass(frozen=True)
class Call:
    """What the model is called with: its arguments, and the indices that its subsampled plates are given."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    indices: dict[str, Tensor] = field(default_factory=dict)


#: One generator for one chain; a list of C for C chains that advance together.
Generators = torch.Generator | Sequence[torch.Generator]


def generator_states(generators: Generators) -> list[Tensor]:
    """State of each generator."""
    listed = [generators] if isinstance(generators, torch.Generator) else generators
    return [generator.get_state() for generator in listed]


def set_generator_states(generators: Generators, states: Sequence[Tensor]) -> None:
    """Inverse of :func:`generator_states`."""
    listed = [generators] if isinstance(generators, torch.Generator) else generators
    for generator, state in zip(listed, states, strict=True):
        generator.set_state(state)


class IndexStream:
    """Batches of ``batch_size`` distinct indices out of ``num_data``: epochs without replacement.

    A permutation serves ``num_data // batch_size`` batches, so its cost for each is O(batch_size). The remainder of an
    epoch is dropped; the next epoch is shuffled afresh, so every batch is a uniform random subset.

    :param generators: one generator gives indices ``(B,)``; a list of C, one a chain, gives ``(C, B)``.
    """

    def __init__(self, num_data: int, batch_size: int, generators: Generators) -> None:
        self.num_data, self.batch_size = num_data, batch_size
        self._generators = generators
        self._position = num_data
        self._before_epoch = generator_states(generators)

    def __next__(self) -> Tensor:
        if self._position + self.batch_size > self.num_data:
            self._shuffle()
        self._position += self.batch_size
        return self._epoch[self._position // self.batch_size - 1]

    def _shuffle(self) -> None:
        self._before_epoch = generator_states(self._generators)
        if isinstance(self._generators, torch.Generator):
            self._epoch = self._batches(self._generators)
        else:  # stacked so that each step's batches are contiguous
            self._epoch = torch.stack([self._batches(generator) for generator in self._generators], 1)
        self._position = 0

    def _batches(self, generator: torch.Generator) -> Tensor:
        order = torch.randperm(self.num_data, generator=generator, device=generator.device)
        return order[: self.num_data - self.num_data % self.batch_size].view(-1, self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        return {"before_epoch": list(self._before_epoch), "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where a stream was. The generators are left just behind its present epoch."""
        if state["position"] + self.batch_size <= self.num_data:  # else the next batch begins an epoch by itself
            set_generator_states(self._generators, state["before_epoch"])
            self._shuffle()
        self._before_epoch, self._position = list(state["before_epoch"]), int(state["position"])


class MinibatchSource(ABC):
    """A source of mini-batches.

    :ivar num_data: number of data in the full set, ``N``; None where no argument has rows.
    """

    num_data: int | None = None

    def start(self, generators: Generators) -> None:
        """Begins a chain, or C chains: all randomness comes from ``generators`` from here on.

        With a list of C generators, :meth:`draw` stacks the batches of C chains, each as it would be by itself.
        """
        self._generators = generators
        self._streams: list[IndexStream] = []

    def _device(self) -> torch.device:
        """Where indices are drawn."""
        first = self._generators if isinstance(self._generators, torch.Generator) else self._generators[0]
        return first.device

    def state_dict(self) -> dict[str, Any]:
        """Where the batches are: with :meth:`load_state_dict`, the next are the same again."""
        streams = [stream.state_dict() for stream in self._streams]
        return {"streams": streams, "generators": generator_states(self._generators)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where a source that was started alike stood."""
        for stream, stream_state in zip(self._streams, state["streams"], strict=True):
            stream.load_state_dict(stream_state)
        set_generator_states(self._generators, state["generators"])

    def cover(self) -> Iterator[tuple[tuple[Tensor, ...], float]]:
        """Batches that together hold each datum equally often, with weights that add up to 1.

        The weighted mean of U over them is that of the full data.

        :raises ValueError: if there are none.
        """
        raise ValueError("There are no mini-batches here: the full data are used at every step.")

    @abstractmethod
    def draw(self) -> tuple[Tensor, ...]:
        """The tensors of the next mini-batch that differ from step to step."""

    @abstractmethod
    def bind(self, inputs: tuple[Tensor, ...]) -> Call:
        """What the model is called with, given what :meth:`draw` returned."""

    def scale(self, inputs: tuple[Tensor, ...]) -> float:
        """Factor by which the likelihood of such a batch estimates that of the full data (N/B)."""
        return 1.0


class FullBatch(MinibatchSource):
    """No mini-batches: the model sees all its arguments at every step."""

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._call = Call(tuple(args), dict(kwargs))
        with_rows = [leaf for leaf in pytree.tree_leaves((tuple(args), dict(kwargs))) if _has_rows(leaf)]
        self.num_data = with_rows[0].shape[0] if with_rows else None

    @classmethod
    def calling(cls, call: Call) -> FullBatch:
        """The same call at every step."""
        source = cls(call.args, call.kwargs)
        source._call = call
        return source

    def draw(self) -> tuple[Tensor, ...]:
        """Nothing changes between steps."""
        return ()

    def bind(self, inputs: tuple[Tensor, ...]) -> Call:
        """The arguments as they came."""
        return self._call


class PlateSubsample(MinibatchSource):
    """The model subsamples itself, in ``pyro.plate(..., subsample_size=B)``; the kernel draws the indices.

    Pyro's plate multiplies the likelihood by N/B, so :meth:`scale` is 1.

    :param dict plates: ``(size, subsample_size)`` by name of plate.
    """

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any], plates: Mapping[str, tuple[int, int]]) -> None:
        self._args, self._kwargs = tuple(args), dict(kwargs)
        self.plates = dict(plates)
        self.num_data = max(size for size, _ in plates.values())

    def start(self, generators: Generators) -> None:
        """Begins chains with one stream of indices for each plate."""
        super().start(generators)
        self._streams = [IndexStream(size, batch, generators) for size, batch in self.plates.values()]

    def draw(self) -> tuple[Tensor, ...]:
        """One index tensor ``(B,)`` a plate."""
        return tuple(next(stream) for stream in self._streams)

    def cover(self) -> Iterator[tuple[tuple[Tensor, ...], float]]:
        """Batches of a fixed size, round and round the data until they end where they began.

        :raises ValueError: if several plates subsample, whose batches do not combine.
        """
        if len(self.plates) > 1:
            raise ValueError(f"Plates {sorted(self.plates)} all subsample; with several there is no simple cover.")
        ((size, batch),) = self.plates.values()
        num_batches = size // math.gcd(size, batch)
        for k in range(num_batches):
            yield ((torch.arange(k * batch, (k + 1) * batch) % size).to(self._device()),), 1 / num_batches

    def bind(self, inputs: tuple[Tensor, ...]) -> Call:
        """All arguments, with the plates' own index sites set."""
        return Call(self._args, self._kwargs, dict(zip(self.plates, inputs, strict=True)))


class RowSubsample(MinibatchSource):
    """Full tensors in, rows out: every tensor argument with leading dimension N is given by rows.

    :param int batch_size: rows a batch.
    :param int num_data: N; by default the leading dimension of the first tensor among the arguments.
    :raises ValueError: if no argument has rows, or ``batch_size`` does not fit.
    """

    def __init__(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], batch_size: int, num_data: int | None = None
    ) -> None:
        leaves, self._spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        with_rows = [leaf for leaf in leaves if _has_rows(leaf)]
        if not with_rows:
            raise ValueError(
                "batch_size= slices the rows of tensors given to mcmc.run(...), but none of the arguments is a tensor "
                "with rows. Pass the full data as tensors, or a DataLoader with num_data=."
            )
        self.num_data = with_rows[0].shape[0] if num_data is None else num_data
        self._leaves = leaves
        self._has_rows = [_has_rows(leaf) and leaf.shape[0] == self.num_data for leaf in leaves]
        if not any(self._has_rows):
            shapes = [tuple(leaf.shape) for leaf in with_rows]
            raise ValueError(f"No argument has num_data={num_data} rows; their shapes are {shapes}.")
        if batch_size > self.num_data:
            raise ValueError(
                f"batch_size={batch_size} is more than the {self.num_data} rows of the data; give at most "
                f"{self.num_data}, or leave batch_size out to use all of them at every step."
            )
        self.batch_size = batch_size

    def start(self, generators: Generators) -> None:
        """Begins chains with a stream of row indices."""
        assert self.num_data is not None
        super().start(generators)
        self._streams = [IndexStream(self.num_data, self.batch_size, generators)]

    def draw(self) -> tuple[Tensor, ...]:
        """Row indices ``(B,)``."""
        return (next(self._streams[0]),)

    def cover(self) -> Iterator[tuple[tuple[Tensor, ...], float]]:
        """The rows in order; the last batch may be shorter."""
        assert self.num_data is not None
        for rows in torch.arange(self.num_data, device=self._device()).split(self.batch_size):
            yield (rows,), len(rows) / self.num_data

    def bind(self, inputs: tuple[Tensor, ...]) -> Call:
        """The arguments, each tensor with N rows reduced to the rows in ``inputs``."""
        (rows,) = inputs
        leaves = [
            leaf.index_select(0, rows.to(leaf.device)) if has_rows else leaf
            for leaf, has_rows in zip(self._leaves, self._has_rows, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return Call(args, kwargs)

    def scale(self, inputs: tuple[Tensor, ...]) -> float:
        """N/B."""
        assert self.num_data is not None
        return self.num_data / inputs[0].shape[0]


class LoaderBatches(MinibatchSource):
    """Batches from an iterable, such as a :class:`~torch.utils.data.DataLoader`, epoch after epoch.

    A tuple or list becomes positional arguments of the model, a dict keyword arguments, a tensor its one argument.
    Batches go to ``device``. A sized iterable that covers the data once an epoch scales every batch by the number of
    batches, also a shorter last one: the mean over an epoch is then exact, and a batch of one row does not count
    N-fold. Others scale by N over the rows of the batch.

    :param int num_data: N.
    :raises ValueError: if ``num_data`` is neither given nor known from ``loader.dataset``.
    """

    def __init__(
        self, loader: Iterable[Any], kwargs: Mapping[str, Any], num_data: int | None, device: torch.device | None = None
    ) -> None:
        if num_data is None:
            try:
                num_data = len(loader.dataset)  # type: ignore[attr-defined]
            except (AttributeError, TypeError):
                raise ValueError(
                    "The number of data behind an iterable of batches is not known, so the likelihood of a batch "
                    "cannot be scaled to the full data. Pass num_data=N to the kernel."
                ) from None
        self.num_data = num_data
        self.device = device
        self._loader, self._kwargs = loader, dict(kwargs)
        self._iterator: Iterator[Any] | None = None
        self._spec: Any = None
        self._full_rows = 0
        self._random_state: Tensor | None = None
        self._before_epoch: Tensor | None = None
        self._num_taken = 0
        self._by_chain: list[LoaderBatches] = []

    def start(self, generators: Generators) -> None:
        """Begins chains: the loader shuffles by a seed drawn from each generator; the global one is left alone."""
        super().start(generators)
        self._by_chain, self._iterator, self._num_taken = [], None, 0
        if not isinstance(generators, torch.Generator):
            self._by_chain = [copy.copy(self) for _ in generators]
            for source, generator in zip(self._by_chain, generators, strict=True):
                source.device = self.device
                source.start(generator)
            return
        seed = torch.randint(2**62, (), generator=generators, device=generators.device)
        self._random_state = torch.Generator().manual_seed(int(seed)).get_state()

    def state_dict(self) -> dict[str, Any]:
        """The random state before this epoch, and the number of batches taken from it."""
        if self._by_chain:
            return {"by_chain": [source.state_dict() for source in self._by_chain]}
        before = self._random_state if self._iterator is None else self._before_epoch
        return {"before_epoch": before, "num_taken": self._num_taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begins the epoch anew and passes over the batches that were taken: as dear as reading these once more."""
        for source, source_state in zip(self._by_chain, state.get("by_chain", ()), strict=True):
            source.load_state_dict(source_state)
        if not self._by_chain:
            self._random_state, self._iterator, self._num_taken = state["before_epoch"], None, 0
            for _ in range(int(state["num_taken"])):
                self._next_batch()

    def draw(self) -> tuple[Tensor, ...]:
        """The tensors of the next batch, flattened.

        :raises DataError: if the iterable is exhausted or a batch holds no tensors.
        """
        if self._by_chain:
            batches = [source.draw() for source in self._by_chain]
            self._spec = self._by_chain[0]._spec
            self._full_rows = self._by_chain[0]._full_rows
            return tuple(torch.stack(leaves) for leaves in zip(*batches, strict=True))
        return self._tensors(self._next_batch())

    def _tensors(self, batch: Any) -> tuple[Tensor, ...]:
        leaves, spec = pytree.tree_flatten(self._as_call(batch))
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        if len(tensors) != len(leaves) or not tensors or tensors[0].dim() == 0:
            raise DataError(
                f"A batch must consist of tensors with rows; got {[type(leaf).__name__ for leaf in leaves]}. Pass what "
                "does not change as a keyword of mcmc.run(...)."
            )
        self._spec = spec
        self._full_rows = max(self._full_rows, tensors[0].shape[0])
        return tensors if self.device is None else tuple(t.to(self.device, non_blocking=True) for t in tensors)

    def cover(self) -> Iterator[tuple[tuple[Tensor, ...], float]]:
        """One epoch of the iterable.

        :raises ValueError: if an epoch does not hold each datum once.
        """
        random_state = torch.get_rng_state()
        try:
            batches = [self._tensors(batch) for batch in self._loader]
        finally:
            torch.set_rng_state(random_state)
        rows = sum(batch[0].shape[0] for batch in batches)
        if rows != self.num_data:
            raise ValueError(
                f"An epoch of the iterable holds {rows} rows, the data {self.num_data}: batches must cover the data "
                "once. Leave out drop_last=True and samplers that draw with replacement."
            )
        for batch in batches:
            yield batch, 1 / self.scale(batch)

    def bind(self, inputs: tuple[Tensor, ...]) -> Call:
        """The batch as the model's arguments."""
        args, kwargs = pytree.tree_unflatten(list(inputs), self._spec)
        return Call(args, {**self._kwargs, **kwargs})

    def scale(self, inputs: tuple[Tensor, ...]) -> float:
        """N/B, with B the average over an epoch where that is known."""
        assert self.num_data is not None
        rows = inputs[0].shape[0]
        try:
            num_batches = len(self._loader)  # type: ignore[arg-type]
        except TypeError:
            return self.num_data / rows
        covers_once = num_batches == -(-self.num_data // max(self._full_rows, rows))
        covers_once = covers_once and not getattr(self._loader, "drop_last", False)
        return float(num_batches) if covers_once else self.num_data / rows

    def _next_batch(self) -> Any:
        """The next batch, drawn under our own random state, so that the global one stays as it was."""
        before = torch.get_rng_state()
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)
        try:
            for _ in range(2):
                if self._iterator is None:
                    self._before_epoch, self._num_taken = torch.get_rng_state(), 0
                    self._iterator = iter(self._loader)
                try:
                    batch = next(self._iterator)
                    self._num_taken += 1
                    return batch
                except StopIteration:
                    self._iterator = None
            raise DataError(
                "The iterable of batches is exhausted. Pass one that can be iterated again, such as a DataLoader or a "
                "list, not an iterator or generator."
            )
        finally:
            if self._random_state is not None:
                self._random_state = torch.get_rng_state()
                torch.set_rng_state(before)

    @staticmethod
    def _as_call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(batch, Mapping):
            return (), dict(batch)
        return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def is_loader(args: Sequence[Any], num_data: int | None) -> bool:
    """Whether the arguments of a run are one iterable of batches, rather than arguments of the model."""
    if len(args) != 1 or isinstance(args[0], (Tensor, str, bytes, Mapping)):
        return False
    is_iterable = isinstance(args[0], Iterable)
    return isinstance(args[0], (DataLoader, Iterator)) or (is_iterable and num_data is not None)


def model_arguments(
    args: Sequence[Any], kwargs: Mapping[str, Any], num_data: int | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments that the model can be called with: the first batch of a loader, else what came.

    :param num_data: the kernel's ``num_data``; where given, any iterable counts as a loader.
    """
    if not is_loader(args, num_data) or isinstance(args[0], Iterator):
        return tuple(args), dict(kwargs)
    source = LoaderBatches(args[0], kwargs, num_data=0)
    source.start(torch.Generator().manual_seed(0))
    call = source.bind(source.draw())
    return call.args, call.kwargs


def check_finite(call: Call) -> None:
    """Raises :class:`~pyro_apd.errors.DataError` naming the first argument with NaN or infinite entries."""
    for path, leaf in pytree.tree_flatten_with_path((call.args, call.kwargs))[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            bad = int((~torch.isfinite(leaf)).sum())
            raise DataError(
                f"Argument {argument_name(path)} of the model, shape {tuple(leaf.shape)}, holds {bad} NaN or infinite "
                "entries. Remove or impute those rows before sampling."
            )
