# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Simulates another processor: products of matrices whose last bits depend on the shapes of their operands.

Libraries of linear algebra choose their routines by processor and by shape, so that sums are taken in another order. On
one machine a product of one chain may equal that of four bit for bit, on another it may not. Under
:class:`OtherRounding` each product and each sum is off by up to one unit in the last place, in a pattern that depends
on the operation, the shapes and a salt. The same call gives the same bits again, as on a real processor.

``PYRO_APD_TEST_ROUNDING=SALT python -m pytest`` runs all tests under it: one that fails rests on bits, or on a
threshold that another processor can cross.
"""

import zlib

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "linear", "convolution"}
_SUMS = {"sum", "mean", "logsumexp", "_log_softmax", "_softmax"}


class OtherRounding(TorchDispatchMode):
    """Perturbs results of products and sums by up to one unit in the last place.

    :param salt: which processor.
    """

    def __init__(self, salt):
        super().__init__()
        self._salt = str(salt)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if (name not in _PRODUCTS and name not in _SUMS) or get_proxy_mode() is not None:
            return result  # what is captured as a graph is perturbed when the graph runs
        if type(result) is not torch.Tensor or not result.is_floating_point() or result.numel() == 0:
            return result
        shapes = [tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)]
        return _perturbed(result, zlib.crc32(repr((self._salt, name, shapes)).encode()))


def _perturbed(result, seed):
    """Every entry times 1, 1 + eps or 1 - eps, in a pattern of the seed."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-1, 2, result.shape, generator=generator, dtype=torch.int8)
    eps = torch.finfo(result.dtype).eps
    # Whole numbers, such as the sum of a one-hot vector, are exact on every processor.
    steps = steps * (result != result.round())
    return torch.where(result.isfinite(), result + result * (steps.to(result.dtype) * eps), result)
