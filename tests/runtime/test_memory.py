# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Freed memory goes back to the system where the C library can do that, and nothing happens elsewhere."""

import ctypes
import sys

import pytest
import torch

from benchmarks.memory import anonymous
from pyro_apd.runtime.memory import give_back_freed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux reports anonymous memory")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library keeps freed memory")
def test_freed_memory_goes_back_to_the_system():
    small = [torch.ones(10_000) for _ in range(2000)]  # 80 MB
    kept = small[-1]
    del small
    before = anonymous()
    give_back_freed()
    assert before - anonymous() > 30e6
    assert bool((kept == 1).all())


@pytest.mark.parametrize("found", [object(), None])
def test_other_libraries_are_left_alone(found, monkeypatch):
    asked = []

    def open_library(name):
        asked.append(name)
        if found is None:
            raise OSError("no library")
        return found

    monkeypatch.setattr(ctypes, "CDLL", open_library)
    give_back_freed()
    assert asked == [None]
