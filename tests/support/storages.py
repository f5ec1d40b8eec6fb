# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""How large what a computation makes becomes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """Notes the largest storage of any result that does not lie in ``mapped``."""

    def __init__(self, mapped):
        super().__init__()
        self._mapped, self.num_bytes = mapped.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() != self._mapped:
                self.num_bytes = max(self.num_bytes, value.untyped_storage().nbytes())
        return out
