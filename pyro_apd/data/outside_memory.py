# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What sources share whose rows are outside memory: they are looked at as they come."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_apd.data.minibatch import Call, MinibatchSource
from pyro_apd.data.targets import Targets, TargetsOfBatches, among


class OutsideMemory(MinibatchSource):
    """A source whose rows are outside memory.

    :ivar watch: called with the call on each batch, until it returns False; None for nothing.
    """

    watch: Callable[[Call], bool] | None = None
    _targets = TargetsOfBatches((), 0)

    def check_targets(self, targets: Sequence[Targets], call: Call, inputs: tuple[Tensor, ...]) -> None:
        """The rows of batches as they come, until N rows have."""
        assert self.num_data is not None
        self._targets = TargetsOfBatches(among(targets, call, inputs), self.num_data)

    def draw(self) -> tuple[Tensor, ...]:
        """The tensors of the next mini-batch; of C chains, with a leading dimension of C."""
        inputs = self._draw()
        if self.watch is not None:
            is_one = isinstance(self._generators, torch.Generator)
            batches = [inputs] if is_one else [tuple(t[i] for t in inputs) for i in range(len(inputs[0]))]
            if not all([self.watch(self.bind(batch)) for batch in batches]):
                self.watch = None
        return inputs

    @abstractmethod
    def _draw(self) -> tuple[Tensor, ...]: ...
