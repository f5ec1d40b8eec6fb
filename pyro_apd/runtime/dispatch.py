# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Modes that see every operation of torch as it is run."""

from __future__ import annotations

from typing import Any


def dispatch_mode() -> Any:
    """The class to inherit from, which is not in torch's public interface.

    :raises ImportError: if torch has no such class where it is today.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class DispatchMode(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            # Otherwise torch imports its compiler, which takes more than a second, at the first operation.
            return False

    return DispatchMode
