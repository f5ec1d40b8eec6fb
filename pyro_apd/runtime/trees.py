# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Nested arguments as lists of leaves, and back: torch's functions for that, from wherever torch keeps them.

They have been in ``torch.utils._pytree`` for years, which is not public; the public ``torch.utils.pytree`` (PyTorch
pull request 175082) is taken where it is there. An order of our own would not do: torch's compiler goes by this one.
"""

from __future__ import annotations

try:
    from torch.utils.pytree import (  # type: ignore[import-not-found, unused-ignore]
        tree_flatten,
        tree_flatten_with_path,
        tree_leaves,
        tree_unflatten,
    )
except ImportError:
    from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_leaves, tree_unflatten

__all__ = ["tree_flatten", "tree_flatten_with_path", "tree_leaves", "tree_unflatten"]
