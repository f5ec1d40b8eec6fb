# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Sources of mini-batches for data in memory: the model's own plates, or rows of full tensors.

Sources for data outside memory are in :mod:`pyro_apd.data.row_reader` and :mod:`pyro_apd.data.loader`;
:mod:`pyro_apd.data.sources` chooses one.

At every step a source gives the tensors that change (:meth:`MinibatchSource.draw`) and the call of the model that they
make (:meth:`MinibatchSource.bind`). The two are separate so that the potential can be captured once, as a function of
the tensors that change.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pyro_apd.data.index_stream import (
    Generators,
    Indices,
    batches_per_epoch,
    generator_states,
    index_stream,
    set_generator_states,
)
from pyro_apd.data.targets import Targets, check_all_rows
from pyro_apd.runtime.trees import tree_flatten, tree_leaves, tree_unflatten

#: Batches that a source outside memory reads beside the first one, for more rows to compare the model on.
NUM_PROBED = 3


@dataclass(frozen=True)
class Call:
    """A call of the model: its arguments, and the indices for its subsampled plates."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    indices: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ProbeRows:
    """Rows on which a model can be called, to see how its likelihood depends on them.

    :ivar int num_rows: rows to choose from: all data where ``has_all``, otherwise those of one batch.
    :ivar int batch_size: rows per mini-batch of the source.
    :ivar call: gives the call on the rows with indices ``(n,)``, which may repeat and be of any number.
    :ivar bool has_all: whether a call on all data can be made.
    :ivar int row_size: numbers per row.
    :ivar str plate: the plate that chooses these rows inside the model; None where the model is given ready rows.
    :ivar labels: arguments of one number for each row, which may be labels or groups.
    """

    num_rows: int
    batch_size: int
    call: Callable[[Tensor], Call]
    has_all: bool = False
    row_size: int = 1
    plate: str | None = None
    labels: tuple[Tensor, ...] = ()


class MinibatchSource(ABC):
    """A source of mini-batches.

    :ivar num_data: number of data in the full set, ``N``; None where no argument has rows.
    :ivar bool is_full: whether every batch is the full data.
    :ivar bool replacement: whether the rows of a batch are drawn independently, rather than in epochs.
    :ivar plates: ``(size, subsample_size)`` by name, of the plates by which the model subsamples itself.
    :ivar int prefetch: how many times ``at_once`` batches a source outside memory reads ahead of their use.
    :ivar int at_once: batches that are used together, and read together.
    :ivar device: where batches are sent; None leaves them where they are.
    :ivar int rows_in_memory: rows that :meth:`call_on` chooses from; 0 where there is no choice.
    """

    num_data: int | None = None
    is_full: bool = False
    replacement: bool = False
    plates: Mapping[str, tuple[int, int]] = MappingProxyType({})
    prefetch: int = 0
    at_once: int = 1
    device: torch.device | None = None
    rows_in_memory: int = 0
    _leaves: Sequence[Any] = ()

    def start(self, generators: Generators) -> None:
        """Starts a chain, or C chains. All random numbers come from ``generators`` from here on.

        With a list of C generators, :meth:`draw` stacks the batches of C chains, each the same as for a single chain.
        """
        self._generators = generators
        self._streams: list[Indices] = []

    def _device(self) -> torch.device:
        """The device on which indices are drawn."""
        first = self._generators if isinstance(self._generators, torch.Generator) else self._generators[0]
        return first.device

    def state_dict(self) -> dict[str, Any]:
        """The position in the sequence of batches: after :meth:`load_state_dict` the same batches follow."""
        streams = [stream.state_dict() for stream in self._streams]
        return {"streams": streams, "generators": generator_states(self._generators)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the position of a source that was started in the same way."""
        for stream, stream_state in zip(self._streams, state["streams"], strict=True):
            stream.load_state_dict(stream_state)
        set_generator_states(self._generators, state["generators"])

    @property
    @abstractmethod
    def epoch_length(self) -> int | None:
        """Mini-batches per epoch without replacement; 1 for full batches, None where batches count as independent."""

    def probe_rows(self, inputs: tuple[Tensor, ...]) -> tuple[ProbeRows, ...]:
        """The rows by which the scaling of the model's likelihood is established; none where it needs no scaling.

        :param inputs: a batch that :meth:`draw` returned for one chain.
        """
        return ()

    @property
    def ahead(self) -> int:
        """Number of batches that are read ahead."""
        return self.prefetch * self.at_once

    def close(self) -> None:  # noqa: B027 - a source in memory has no thread
        """Ends the source's thread, if it has one; no more batches are drawn."""

    def row_numbers(self, inputs: tuple[Tensor, ...]) -> Tensor | None:
        """The numbers in the full data of the rows of a batch; None where they are not known."""
        rows = inputs[0] if self.rows_in_memory and not self.plates else None
        return torch.arange(self.num_data or 0) if self.is_full else rows

    def call_on(self, rows: Tensor) -> Call:
        """The call on chosen rows in memory; of a plate, as many as it draws."""
        return self.bind((rows.to(self._device()),))

    def check_targets(self, targets: Sequence[Targets], call: Call, inputs: tuple[Tensor, ...]) -> None:
        """Checks all rows of arguments that are the values of an observed site, or has them checked as they come.

        :param targets: with positions among the leaves of the arguments of ``call``, on the batch ``inputs``.
        :raises DataError: if a value lies outside its support.
        """
        check_all_rows(targets, self._leaves)

    def cover(self) -> Iterator[tuple[tuple[Tensor, ...], float]]:
        """Batches in which each datum occurs equally often, with weights that sum to 1.

        The weighted mean of U over them is U of the full data.

        :raises ValueError: if the source has no such batches.
        """
        raise ValueError("There are no mini-batches here: the full data are used at every step.")

    @abstractmethod
    def draw(self) -> tuple[Tensor, ...]:
        """The tensors of the next mini-batch that change from step to step."""

    @abstractmethod
    def bind(self, inputs: tuple[Tensor, ...]) -> Call:
        """The call of the model for the tensors that :meth:`draw` returned."""

    def scale(self, inputs: tuple[Tensor, ...]) -> float:
        """Factor N/B that makes the log-likelihood of such a batch an estimate of that of the full data."""
        return 1.0


class FullBatch(MinibatchSource):
    """No mini-batches: the model is called with all its arguments at every step."""

    is_full = True

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._call = Call(tuple(args), dict(kwargs))
        with_rows = [leaf for leaf in tree_leaves((tuple(args), dict(kwargs))) if _has_rows(leaf)]
        self.num_data = with_rows[0].shape[0] if with_rows else None

    @classmethod
    def calling(cls, call: Call) -> FullBatch:
        """The same call at every step."""
        source = cls(call.args, call.kwargs)
        source._call = call
        return source

    def draw(self) -> tuple[Tensor, ...]:
        """An empty tuple: nothing changes from step to step."""
        return ()

    def bind(self, inputs: tuple[Tensor, ...]) -> Call:
        """The arguments unchanged."""
        return self._call

    @property
    def epoch_length(self) -> int:
        """1: every batch is the full data."""
        return 1


class PlateSubsample(MinibatchSource):
    """The model subsamples itself, in ``pyro.plate(..., subsample_size=B)``; the kernel draws the indices.

    Pyro's plate multiplies the likelihood by N/B, so :meth:`scale` is 1.

    :param dict plates: ``(size, subsample_size)`` by name of plate.
    :param bool replacement: see :func:`~pyro_apd.data.index_stream.index_stream`.
    """

    def __init__(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        plates: Mapping[str, tuple[int, int]],
        replacement: bool = False,
    ) -> None:
        self._args, self._kwargs = tuple(args), dict(kwargs)
        self.plates = dict(plates)
        self.replacement = replacement
        self.num_data = max(size for size, _ in plates.values())
        self.rows_in_memory = self.num_data if len(plates) == 1 else 0
        self._leaves = tree_leaves((self._args, self._kwargs))

    def start(self, generators: Generators) -> None:
        """Starts chains with one stream of indices per plate."""
        super().start(generators)
        self._streams = [index_stream(*plate, generators, self.replacement) for plate in self.plates.values()]

    def draw(self) -> tuple[Tensor, ...]:
        """One index tensor ``(B,)`` per plate."""
        return tuple(next(stream) for stream in self._streams)

    def cover(self) -> Iterator[tuple[tuple[Tensor, ...], float]]:
        """Consecutive batches of a fixed size, over the data as a ring, until the last one ends at row 0.

        :raises ValueError: if several plates subsample.
        """
        if len(self.plates) > 1:
            raise ValueError(
                f"Plates {sorted(self.plates)} all subsample. Batches that hold each datum equally often exist for one "
                "plate only; leave subsample_size out of the others."
            )
        ((size, batch),) = self.plates.values()
        num_batches = size // math.gcd(size, batch)
        for k in range(num_batches):
            yield ((torch.arange(k * batch, (k + 1) * batch) % size).to(self._device()),), 1 / num_batches

    def bind(self, inputs: tuple[Tensor, ...]) -> Call:
        """All arguments, with the indices for the plates."""
        return Call(self._args, self._kwargs, dict(zip(self.plates, inputs, strict=True)))

    @property
    def epoch_length(self) -> int | None:
        """Mini-batches per epoch of the one plate; None for several, whose epochs differ."""
        if len(self.plates) > 1:
            return None
        ((size, batch),) = self.plates.values()
        return batches_per_epoch(size, batch, self.replacement)

    def probe_rows(self, inputs: tuple[Tensor, ...]) -> tuple[ProbeRows, ...]:
        """The rows of each plate, while the other plates keep those of the batch."""
        indices = dict(zip(self.plates, inputs, strict=True))

        def calling(name: str) -> Callable[[Tensor], Call]:
            return lambda rows: Call(self._args, self._kwargs, {**indices, name: rows.to(indices[name].device)})

        return tuple(
            ProbeRows(
                size, batch, calling(name), False, _row_size(self._leaves, size), name, _labels(self._leaves, size)
            )
            for name, (size, batch) in self.plates.items()
        )


class RowSubsample(MinibatchSource):
    """Rows of full tensors: every tensor argument with leading dimension N is reduced to the rows of the batch.

    :param int batch_size: rows per batch.
    :param int num_data: N; by default the leading dimension of the first tensor among the arguments.
    :param bool replacement: see :func:`~pyro_apd.data.index_stream.index_stream`.
    :raises ValueError: if no argument has rows, or ``batch_size`` does not fit.
    """

    def __init__(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        batch_size: int,
        num_data: int | None = None,
        replacement: bool = False,
    ) -> None:
        leaves, self._spec = tree_flatten((tuple(args), dict(kwargs)))
        with_rows = [leaf for leaf in leaves if _has_rows(leaf)]
        if not with_rows:
            raise ValueError(
                "batch_size= slices the rows of tensors given to mcmc.run(...), but none of the arguments is a tensor "
                "with rows. Pass the full data as tensors, or a DataLoader with num_data=."
            )
        self.num_data = self.rows_in_memory = with_rows[0].shape[0] if num_data is None else num_data
        self._leaves = leaves
        self._has_rows = [_has_rows(leaf) and leaf.shape[0] == self.num_data for leaf in leaves]
        if not any(self._has_rows):
            shapes = [tuple(leaf.shape) for leaf in with_rows]
            raise ValueError(f"No argument has num_data={num_data} rows; their shapes are {shapes}.")
        check_batch_size(batch_size, self.num_data)
        self.batch_size = batch_size
        self.replacement = replacement

    def start(self, generators: Generators) -> None:
        """Starts chains with a stream of row indices."""
        assert self.num_data is not None
        super().start(generators)
        self._streams = [index_stream(self.num_data, self.batch_size, generators, self.replacement)]

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
        args, kwargs = tree_unflatten(leaves, self._spec)
        return Call(args, kwargs)

    @property
    def epoch_length(self) -> int | None:
        """See :func:`~pyro_apd.data.index_stream.batches_per_epoch`."""
        assert self.num_data is not None
        return batches_per_epoch(self.num_data, self.batch_size, self.replacement)

    def probe_rows(self, inputs: tuple[Tensor, ...]) -> tuple[ProbeRows, ...]:
        """All rows."""
        assert self.num_data is not None
        leaves = [leaf for leaf, has_rows in zip(self._leaves, self._has_rows, strict=True) if has_rows]
        row_size, labels = _row_size(leaves, self.num_data), _labels(leaves, self.num_data)
        return (
            ProbeRows(self.num_data, self.batch_size, lambda rows: self.bind((rows,)), True, row_size, labels=labels),
        )

    def scale(self, inputs: tuple[Tensor, ...]) -> float:
        """N/B."""
        assert self.num_data is not None
        return self.num_data / inputs[0].shape[0]


def joined(batches: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The rows of several batches together; of the first one alone, if their shapes differ."""
    first = [(tensor.shape[1:], tensor.dtype) for tensor in batches[0]]
    if any([(tensor.shape[1:], tensor.dtype) for tensor in batch] != first for batch in batches):
        return batches[0]
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def check_batch_size(batch_size: int, num_data: int) -> None:
    """Raises ValueError if a batch would have more rows than there are."""
    if batch_size > num_data:
        raise ValueError(
            f"batch_size={batch_size} is more than the {num_data} rows of the data; pass at most {num_data}, or leave "
            "batch_size out to use all rows at every step."
        )


def _labels(leaves: Sequence[Any], num_rows: int) -> tuple[Tensor, ...]:
    """The tensors of one number for each of ``num_rows`` rows."""
    return tuple(leaf.reshape(-1) for leaf in leaves if _has_rows(leaf) and len(leaf) == leaf.numel() == num_rows)


def _row_size(leaves: Sequence[Any], num_rows: int) -> int:
    """Numbers per row in all tensors of ``num_rows`` rows together."""
    total = sum(int(leaf.numel()) for leaf in leaves if _has_rows(leaf) and len(leaf) == num_rows)
    return total // max(num_rows, 1)


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0
