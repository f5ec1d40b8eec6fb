# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Counts the arithmetic of a function, and estimates from that how long it takes on one thread of a CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from pyro_apd.runtime.dispatch import dispatch_mode
from pyro_apd.runtime.trees import tree_leaves

logger = logging.getLogger("pyro_apd")

# Seconds on one thread of a server's CPU: of a multiplication within a product of matrices, and of a byte of a result.
_SECONDS_PER_PRODUCT = 4e-11
_SECONDS_PER_BYTE = 2.5e-10


@dataclass(frozen=True)
class OperationCount:
    """Arithmetic of a call.

    :ivar int num_products: multiplications, in matrix products and convolutions.
    :ivar int num_bytes: size of all intermediate results, which a gradient keeps.
    """

    num_products: int = 0
    num_bytes: int = 0

    @classmethod
    def of(cls, function: Callable[[], object]) -> OperationCount:
        """Measured by calling the function once; zero where torch cannot count an operation."""
        try:
            with torch.no_grad(), _counter() as counter:
                function()
        except Exception as error:
            logger.debug("The operations of a call are not known: %s.", error)
            return cls()
        return cls(counter.num_products, counter.num_bytes)

    @property
    def gradient_seconds(self) -> float:
        """Estimated time of the call and its gradient on one thread, right to a factor of about two.

        It follows from the counts alone, so that what is decided by it is decided again in the same way.
        """
        return 3 * (self.num_products * _SECONDS_PER_PRODUCT + self.num_bytes * _SECONDS_PER_BYTE)


def _counter() -> Any:
    """A dispatch mode that adds up the multiplications of operations, and the sizes of their results, except views of
    their arguments.

    :raises ImportError: see :func:`dispatch_mode`.
    """

    class Counter(dispatch_mode()):  # type: ignore[misc]
        num_products = 0
        num_bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            arguments = {_address(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
            results = func(*args, **kwargs)
            operations = flop_registry.get(func.overloadpacket)
            if operations is not None:
                self.num_products += int(operations(*args, **kwargs, out_val=results)) // 2
            for value in tree_leaves(results):
                if isinstance(value, Tensor) and _address(value) not in arguments:
                    self.num_bytes += value.numel() * value.element_size()
            return results

    return Counter()


def _address(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()
