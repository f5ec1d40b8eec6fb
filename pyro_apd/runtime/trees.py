# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Nested arguments as lists of leaves, and back: torch's pytree functions, from the public module where it exists.

The public module is ``torch.utils.pytree`` (PyTorch pull request 175082). Older versions of torch have the same
functions in the private ``torch.utils._pytree``. The order of the leaves must be torch's: its compiler uses it, too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

try:
    from torch.utils.pytree import (  # type: ignore[import-not-found, unused-ignore]
        tree_flatten,
        tree_flatten_with_path,
        tree_leaves,
        tree_unflatten,
    )
except ImportError:
    from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_leaves, tree_unflatten

__all__ = ["detached", "tree_flatten", "tree_flatten_with_path", "tree_leaves", "tree_unflatten"]


def detached(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments without gradients, also those inside of tuples and dicts."""
    leaves, spec = tree_flatten(args)
    found: tuple[Any, ...] = tree_unflatten([v.detach() if isinstance(v, Tensor) else v for v in leaves], spec)
    return found
