# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Arguments whose rows are the values of an observed site: each row must lie in the support of the likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_apd.errors import DataError
from pyro_apd.runtime.trees import tree_leaves

if TYPE_CHECKING:
    from pyro_apd.data.minibatch import Call

# Entries of a value that a message shows.
_MAX_SHOWN = 5
_INTERVAL = type(constraints.integer_interval(0, 1))
# Numbers that are checked at once, to bound the memory that it takes.
_MAX_NUMBERS = 10**7


@dataclass(frozen=True)
class Targets:
    """An argument whose rows are the values of an observed site.

    :ivar str site: the site.
    :ivar str argument: the argument, as messages name it.
    :ivar int leaf: its position among the leaves of the model's arguments, or of a batch.
    :ivar Constraint support: the constraint that values satisfy; the same for all rows.
    :ivar str likelihood: the site's distribution, as messages name it.
    :ivar shape: shape of the site's value for one row.
    :ivar dtype: of the site's values.
    """

    site: str
    argument: str
    leaf: int
    support: Constraint
    likelihood: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def check(self, rows: Tensor, place: Callable[[int], str]) -> None:
        """Checks rows of the argument.

        :param rows: ``(n, ...)``.
        :param place: what messages call the row of an index, such as ``"row 3"``.
        :raises DataError: if a value lies outside the support.
        """
        size = max(1, _MAX_NUMBERS * len(rows) // max(rows.numel(), 1))
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            values = part.to(self.dtype).reshape(len(part), *self.shape)
            inside = self.support.check(values).reshape(len(part), -1).all(-1)
            if not bool(inside.all()):
                bad = (~inside).nonzero()[:, 0]
                value = shown_value(values[bad[0]], self.support)
                where = f"{place(first + int(bad[0]))} of argument {self.argument}"
                raise DataError(outside_message(self.site, self.likelihood, self.support, value, where, len(bad)))


def among(targets: Sequence[Targets], call: Call, inputs: Sequence[Tensor]) -> list[Targets]:
    """Those targets that change with the batch, with their positions among its tensors.

    :param targets: with positions among the leaves of the arguments of ``call``.
    :param call: of the model on a batch, and ``inputs`` the tensors of the batch.
    """
    leaves = tree_leaves((call.args, call.kwargs))
    found = [(target, i) for target in targets for i, tensor in enumerate(inputs) if tensor is leaves[target.leaf]]
    return [replace(target, leaf=i) for target, i in found]


def check_all_rows(targets: Sequence[Targets], leaves: Sequence[Any]) -> None:
    """Checks all rows of arguments in memory.

    :param leaves: all leaves of the arguments.
    :raises DataError: if a value lies outside its support.
    """
    for target in targets:
        target.check(leaves[target.leaf], lambda row: f"row {row}")


class TargetsOfBatches:
    """Checks the targets of batches from outside memory as they come, until N rows have come.

    :param targets: with positions among the tensors of a batch.
    :param int num_data: N.
    """

    def __init__(self, targets: Sequence[Targets], num_data: int) -> None:
        self._targets = tuple(targets)
        self._num_left = num_data

    def again(self, num_data: int) -> TargetsOfBatches:
        """The same from the first row on."""
        return TargetsOfBatches(self._targets, num_data)

    def look(self, tensors: Sequence[Tensor], place: Callable[[int], str]) -> None:
        """Checks one batch.

        :raises DataError: as :meth:`Targets.check`.
        """
        if self._num_left > 0 and self._targets:
            self._num_left -= len(tensors[0])
            for target in self._targets:
                target.check(tensors[target.leaf], place)


def outside_message(site: str, likelihood: str, support: Constraint, value: str, where: str, count: int = 1) -> str:
    """The message about a value outside the support."""
    others = f" {count - 1} other rows are outside, too." if count > 1 else ""
    return (
        f"Observed site '{site}' has the value {value} in {where}, outside the support of its likelihood "
        f"{likelihood}: {_described(support)}.{others}{_advice(support)} Correct these rows or remove them."
    )


def shown_value(value: Tensor, support: Constraint) -> str:
    """A row's value, of several entries those that are outside the support, as far as that shows."""
    try:
        inside = entrywise(support).check(value)
        if inside.shape == value.shape and not bool(inside.all()):
            value = value[~inside]
    except (RuntimeError, ValueError, NotImplementedError):  # a constraint on all entries together
        pass
    entries = [f"{float(entry):g}" for entry in value.detach().reshape(-1)[:_MAX_SHOWN]]
    return entries[0] if value.numel() == 1 else f"[{', '.join(entries)}{', ...' * (value.numel() > _MAX_SHOWN)}]"


def entrywise(support: Constraint) -> Constraint:
    """The constraint on each entry, of one on several that are independent."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _described(support: Constraint) -> str:
    base = entrywise(support)
    if base is constraints.boolean:
        return "0 or 1"
    if any(isinstance(bound, Tensor) and bound.numel() > 1 for bound in vars(base).values()):
        return f"{type(base).__name__.strip('_')} with bounds that differ by row"
    if isinstance(base, _INTERVAL):
        return f"integers from {int(base.lower_bound)} to {int(base.upper_bound)}"
    return str(base)[:80]


def _advice(support: Constraint) -> str:
    base = entrywise(support)
    if base is constraints.boolean:
        return " For {-1, 1} use (y + 1) / 2."
    if isinstance(base, _INTERVAL) and isinstance(base.lower_bound, int) and isinstance(base.upper_bound, int):
        return " Classes that count from 1 need y - 1."
    return ""
