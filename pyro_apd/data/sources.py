# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""From the arguments of a run to the source of its mini-batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.messenger import unwrap
from torch import Tensor

from pyro_apd.data.arguments import check_kinds, check_one_device, check_rows_first, with_tensors
from pyro_apd.data.loader import LoaderBatches, is_loader
from pyro_apd.data.minibatch import FullBatch, MinibatchSource, RowSubsample
from pyro_apd.data.row_reader import RowReader, has_stored_rows
from pyro_apd.runtime.trees import tree_leaves

logger = logging.getLogger("pyro_apd")

# Full batches of so many rows are more likely an oversight than intended.
_MANY_ROWS = 5000
# Rows of stored data that `shown_arguments` reads.
_SHOWN_ROWS = 2000


def open_source(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    batch_size: int | None = None,
    num_data: int | None = None,
    replacement: bool = False,
    device: torch.device | None = None,
    generator: torch.Generator,
) -> tuple[MinibatchSource, tuple[Tensor, ...]]:
    """The source of mini-batches for the arguments of a run, and its first batch.

    :param args: the model's arguments, or one iterable of batches.
    :param kwargs: its keyword arguments.
    :param int batch_size: rows per batch, for a model written for the full data.
    :param int num_data: size of the full data, where ``args`` does not show it.
    :param bool replacement: draw the rows of a batch independently, rather than in epochs.
    :param device: where batches from outside memory are sent; None leaves them where they are.
    :param generator: of the first batch.
    :returns: the source, started, and what its :meth:`~pyro_apd.data.minibatch.MinibatchSource.draw` gave first.
    :raises DataError: if data are of a kind that models do not take, hold no rows, or lie on several devices.
    :raises ValueError: if ``batch_size`` or ``num_data`` does not fit the data, or ``replacement`` the source.
    """
    check_kinds(args, kwargs)
    args, kwargs = with_tensors(args, kwargs)
    if is_loader(args, num_data):
        _check_loader_settings(batch_size, replacement)
        loader = LoaderBatches(args[0], kwargs, num_data, device)
        check_one_device((), kwargs)
        inputs = _first_batch(loader, generator)
        call = loader.bind_alone(inputs)
        check_rows_first(call.args, call.kwargs)
        return loader, inputs
    if batch_size is not None and has_stored_rows(args, kwargs):
        reader = RowReader(args, kwargs, batch_size, num_data, replacement, device)
        inputs = _first_batch(reader, generator)
        check_one_device(reader.bind(inputs).args, kwargs)
        return reader, inputs
    source: MinibatchSource
    if batch_size is not None:
        source = RowSubsample(args, kwargs, batch_size, num_data, replacement)
    else:
        source = FullBatch(args, kwargs)
    check_one_device(args, kwargs)
    return source, _first_batch(source, generator)


def _first_batch(source: MinibatchSource, generator: torch.Generator) -> tuple[Tensor, ...]:
    source.start(generator)
    return source.draw()


def _check_loader_settings(batch_size: int | None, replacement: bool) -> None:
    if batch_size is not None:
        raise ValueError(
            f"batch_size={batch_size} is for full tensors; this run was given an iterable of batches, which has "
            "its own. Leave batch_size out."
        )
    if replacement:
        raise ValueError(
            "replacement=True is for batch_size= and plates; an iterable of batches draws by itself. Give the "
            "DataLoader sampler=RandomSampler(dataset, replacement=True)."
        )


def check_stated_number(
    num_data: int, source: MinibatchSource, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Checks the ``num_data`` of a run whose likelihood it does not scale: that of plates, or of full batches.

    :param source: the run's source, and ``args`` and ``kwargs`` the model's arguments.
    :raises ValueError: if no plate that subsamples, or of full batches no argument, has so many rows.
    """
    if source.plates:
        sizes = {name: size for name, (size, _) in source.plates.items()}
        if num_data not in sizes.values():
            raise ValueError(
                f"num_data={num_data}, but the model scales its likelihood by its own plates, of sizes {sizes}. Leave "
                "num_data out, or give the plate another size."
            )
        return
    shapes = [
        tuple(leaf.shape) for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor) and leaf.dim()
    ]
    if shapes and not any(num_data in shape for shape in shapes):
        raise ValueError(
            f"num_data={num_data}, but every step uses all data, and no argument has {num_data} rows; their shapes are "
            f"{str(shapes)[:300]}. The likelihood is that of the rows which are given, and nothing scales it. Leave "
            "num_data out; if the rows stand for more data, use pyro.poutine.scale(scale=...) around the observed site."
        )


def check_full_batches(num_data: int | None, replacement: bool) -> None:
    """Checks a run whose every step uses all data; warns where there are many.

    :raises ValueError: if ``replacement`` is set, which has no effect on full batches.
    """
    if replacement:
        raise ValueError(
            "replacement=True is about mini-batches, and every step here uses all data. Give the kernel batch_size=, "
            "or the plate subsample_size=."
        )
    if (num_data or 0) >= _MANY_ROWS:
        logger.warning(
            "Every step uses all %d rows. For mini-batches give the kernel batch_size=, or the plate subsample_size=.",
            num_data,
        )


def shown_arguments(
    args: Sequence[Any], kwargs: Mapping[str, Any], num_data: int | None = None
) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """Arguments that the model can be called with, from those of a run, and whether they hold all data.

    They are the first batch of a loader; of stored data, up to 2,000 evenly spaced rows; otherwise the arguments
    unchanged, also an iterator, whose first batch would be lost.

    :param num_data: the kernel's ``num_data``; where given, any iterable counts as a loader.
    """
    args, kwargs = with_tensors(tuple(args), kwargs)
    if is_loader(args, num_data):
        if isinstance(args[0], Iterator):
            return tuple(args), dict(kwargs), False
        loader = LoaderBatches(args[0], kwargs, num_data)
        call = loader.bind(_first_batch(loader, torch.Generator().manual_seed(0)))
        return call.args, call.kwargs, False
    if not has_stored_rows(args, kwargs):
        return tuple(args), dict(kwargs), True
    reader = RowReader(args, kwargs, 1, num_data)
    assert reader.num_data is not None
    count = min(_SHOWN_ROWS, reader.num_data)
    call = reader.spread_rows(count)
    return call.args, call.kwargs, count == reader.num_data


def model_device(model: Callable[..., Any], kwargs: Mapping[str, Any]) -> torch.device | None:
    """Where batches are sent before a chain chooses: the device of fixed arguments or of the model; None for the CPU.

    :param kwargs: the fixed arguments.
    """
    tensors = [leaf for leaf in tree_leaves(dict(kwargs)) if isinstance(leaf, Tensor)]
    module = unwrap(model)  # the first run of a model is inside a messenger
    if isinstance(module, torch.nn.Module):
        tensors += [*module.parameters(), *module.buffers()]
    return next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
