# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Where mini-batches come from: the model's own plates, or rows of full tensors.

Those that are not in memory are in :mod:`pyro_apd.data.row_reader` and :mod:`pyro_apd.data.loader`.

A source answers two questions at every step: which tensors change (:meth:`MinibatchSource.draw`), and what the model
is then called with (:meth:`MinibatchSource.bind`). Keeping them apart lets the potential be traced once, as a function
of the tensors that change.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_apd.data.arguments import argument_name
from pyro_apd.data.index_stream import Generators, Indices, generator_states, index_stream, set_generator_states
from pyro_apd.errors import DataError
from pyro_apd.runtime.trees import tree_flatten, tree_flatten_with_path, tree_leaves, tree_unflatten


@dataclass(frozen=True)
class Call:
    """What the model is called with: its arguments, and the indices that its subsampled plates are given."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    indices: dict[str, Tensor] = field(default_factory=dict)


class MinibatchSource(ABC):
    """A source of mini-batches.

    :ivar num_data: number of data in the full set, ``N``; None where no argument has rows.
    :ivar bool replacement: whether each row of a batch is drawn by itself, rather than in epochs.
    :ivar int prefetch: how many times ``at_once`` batches a source outside memory reads ahead of their use.
    :ivar int at_once: batches that are used together, and read together.
    :ivar device: where it sends them; None leaves them where they are.
    """

    num_data: int | None = None
    replacement: bool = False
    prefetch: int = 0
    at_once: int = 1
    device: torch.device | None = None

    def start(self, generators: Generators) -> None:
        """Begins a chain, or C chains: all randomness comes from ``generators`` from here on.

        With a list of C generators, :meth:`draw` stacks the batches of C chains, each as it would be by itself.
        """
        self._generators = generators
        self._streams: list[Indices] = []

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

    @property
    def ahead(self) -> int:
        """Batches that are read ahead."""
        return self.prefetch * self.at_once

    def close(self) -> None:  # noqa: B027 - a source in memory has nothing to end
        """Ends what runs beside the chain, which draws no more."""

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
        with_rows = [leaf for leaf in tree_leaves((tuple(args), dict(kwargs))) if _has_rows(leaf)]
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
        self.plates, self.replacement = dict(plates), replacement
        self.num_data = max(size for size, _ in plates.values())

    def start(self, generators: Generators) -> None:
        """Begins chains with one stream of indices for each plate."""
        super().start(generators)
        self._streams = [index_stream(*plate, generators, self.replacement) for plate in self.plates.values()]

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
        self.num_data = with_rows[0].shape[0] if num_data is None else num_data
        self._leaves = leaves
        self._has_rows = [_has_rows(leaf) and leaf.shape[0] == self.num_data for leaf in leaves]
        if not any(self._has_rows):
            shapes = [tuple(leaf.shape) for leaf in with_rows]
            raise ValueError(f"No argument has num_data={num_data} rows; their shapes are {shapes}.")
        check_batch_size(batch_size, self.num_data)
        self.batch_size, self.replacement = batch_size, replacement

    def start(self, generators: Generators) -> None:
        """Begins chains with a stream of row indices."""
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

    def scale(self, inputs: tuple[Tensor, ...]) -> float:
        """N/B."""
        assert self.num_data is not None
        return self.num_data / inputs[0].shape[0]


def check_batch_size(batch_size: int, num_data: int) -> None:
    """Raises ValueError if a batch would have more rows than there are."""
    if batch_size > num_data:
        raise ValueError(
            f"batch_size={batch_size} is more than the {num_data} rows of the data; give at most {num_data}, or leave "
            "batch_size out to use all of them at every step."
        )


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def check_finite(call: Call) -> None:
    """Raises :class:`~pyro_apd.errors.DataError` naming the first argument with NaN or infinite entries."""
    for path, leaf in tree_flatten_with_path((call.args, call.kwargs))[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            bad = int((~torch.isfinite(leaf)).sum())
            raise DataError(
                f"Argument {argument_name(path)} of the model, shape {tuple(leaf.shape)}, holds {bad} NaN or infinite "
                "entries. Remove or impute those rows before sampling."
            )
