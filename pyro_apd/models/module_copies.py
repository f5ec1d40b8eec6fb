# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Copies of a module for calls from several threads, since a functional call sets the weights of what it is given."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class ModuleCopies:
    """Copies of one module that share its tensors. As many are kept as were in use at once.

    :param torch.nn.Module module: what is copied.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._idle: list[nn.Module] = []

    @contextmanager
    def own(self) -> Iterator[nn.Module]:
        """A copy that no other thread uses."""
        try:
            mine = self._idle.pop()
        except IndexError:
            tensors = (*self._module.parameters(), *self._module.buffers())
            mine = copy.deepcopy(self._module, {id(tensor): tensor for tensor in tensors})
        try:
            yield mine
        finally:
            self._idle.append(mine)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_idle": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleCopies:
        return ModuleCopies(copy.deepcopy(self._module, memo))
