# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Gives memory that was freed back to the system."""

from __future__ import annotations

import ctypes


def give_back_freed() -> None:
    """Gives back what glibc keeps of freed memory: all blocks of up to 32 MB, which may add up to many networks.

    Without effect where the C library has no ``malloc_trim``.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return
    trim(0)
