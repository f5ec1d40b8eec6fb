# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Batches that a loader's ``collate_fn`` makes, where what becomes of an item depends on the others in its batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from pyro_apd.data.epochs import joins_rows
from pyro_apd.data.samplers import preserved_random_states
from pyro_apd.runtime.trees import tree_leaves

# Items that are collated alone and together, to see whether that differs.
_NUM_COMPARED = 8


@dataclass(frozen=True)
class CollatedItems:
    """Items of a dataset, and how batches are made of them.

    :ivar items: one for each row of a batch.
    :ivar collate: makes a batch of items.
    """

    items: Sequence[Any]
    collate: Callable[[list[Any]], Any]

    def batch(self, rows: Tensor) -> Any:
        """The batch of the items with indices ``(n,)``."""
        return self.collate([self.items[int(row)] for row in rows])


def items_by_company(loader: Iterable[Any], num_batches: int, shapes_differ: bool) -> CollatedItems | None:
    """The items of the first batches of a loader whose ``collate_fn`` makes something else of an item in other company.

    It may pad sequences to the longest of a batch, for example. The model is then to be compared on batches that are
    collated again, rather than on rows of batches.

    :param bool shapes_differ: whether rows of some batches are known to have other shapes than those of others.
    :returns: None for other loaders, and where a batch of the same items is another each time.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or not joins_rows(loader):
        return None
    if loader.batch_sampler is None:
        return None
    with preserved_random_states():
        try:
            indices = [list(batch) for batch in itertools.islice(loader.batch_sampler, num_batches)]
            first = CollatedItems([loader.dataset[i] for i in indices[0][:_NUM_COMPARED]], loader.collate_fn)
            if not _is_by_item(first) or not (shapes_differ or _depends_on_company(first)):
                return None
            rest = [loader.dataset[i] for i in itertools.chain(*indices)][len(first.items) :]
        except Exception:  # a loader that is made for whole batches alone
            return None
    return CollatedItems([*first.items, *rest], loader.collate_fn)


def _is_by_item(sample: CollatedItems) -> bool:
    """Whether a batch has one row for each item, and is the same each time."""
    one, again = (_tensors(sample.batch(torch.arange(len(sample.items)))) for _ in range(2))
    return all(len(tensor) == len(sample.items) for tensor in one) and _are_equal(one, again)


def _depends_on_company(sample: CollatedItems) -> bool:
    together = _tensors(sample.batch(torch.arange(len(sample.items))))
    for row in range(len(sample.items)):
        alone = _tensors(sample.batch(torch.tensor([row])))
        if not _are_equal(alone, [tensor[row : row + 1] for tensor in together]):
            return True
    return False


def _tensors(batch: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]


def _are_equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and bool(torch.isclose(a, b, equal_nan=True).all()) for a, b in zip(one, other, strict=True)
    )
