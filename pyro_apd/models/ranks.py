# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Refuses models that number groups by the values that a batch happens to hold.

``torch.unique(groups, return_inverse=True)[1]`` numbers the groups of one batch. In a batch that lacks a group, others
get other numbers, and so other latents. Batches may be too much alike to show it, as those of sorted data are. So the
model is run with a value more in each result of ``torch.unique``, a copy of the first one that no row has: what is
computed for each value, and given to the rows that have it, stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pyro_apd.errors import ModelError
from pyro_apd.models.row_terms import ModelRun


def refuse_ranks(run: Callable[[], ModelRun], names: Sequence[str]) -> None:
    """Raises ModelError if a site depends on how many values ``torch.unique`` finds in a batch.

    :param run: runs the model on a batch, each time with the same latents.
    :param names: observed sites.
    """
    with _one_value_more() as calls:
        try:
            other: ModelRun | None = run()
        except Exception:
            other = None
    if not calls:
        return
    plain = run()
    for name in names:
        if other is None or name not in other.observed or plain.site(name).differs(other.site(name)):
            raise ModelError(
                f"Observed site '{name}' depends on how many values torch.unique finds in a batch, as numbers of "
                "groups by return_inverse=True do: in a batch that lacks a group the others get other numbers, and so "
                "other latents. Number the groups of all data before the run, and pass the numbers as an argument."
            )


@contextmanager
def _one_value_more() -> Iterator[list[None]]:
    """Context in which ``torch.unique`` finds a value more, in this thread; yields a list with an entry per call."""
    original, thread = torch.unique, get_ident()
    calls: list[None] = []

    def unique(
        input: Tensor,
        sorted: bool = True,
        return_inverse: bool = False,
        return_counts: bool = False,
        dim: int | None = None,
    ) -> Any:
        if get_ident() != thread or input.numel() == 0:
            return original(input, sorted, return_inverse, return_counts, dim)
        calls.append(None)
        values, inverse, counts = original(input, sorted, True, True, dim)
        along = 0 if dim is None else dim
        found = [torch.cat([values.narrow(along, 0, 1), values], along)]
        found += [inverse + 1] if return_inverse else []
        found += [torch.cat([counts.new_zeros(1), counts])] if return_counts else []
        return tuple(found) if len(found) > 1 else found[0]

    with mock.patch.object(torch, "unique", unique):
        yield calls
