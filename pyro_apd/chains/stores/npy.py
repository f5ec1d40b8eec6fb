# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The files of a store of draws: arrays of NumPy, made at their full size, written in place, and read by a mapping."""

from __future__ import annotations

import math
import mmap
import os
import sys
import tokenize
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_apd.errors import shortened
from pyro_apd.runtime.files import check_regular

#: Numbers of a file by the dtype of the draws; NumPy has no bfloat16.
DTYPES = {torch.float32: "<f4", torch.float64: "<f8", torch.float16: "<f2", torch.bfloat16: "<i2"}


def damaged(path: Path, what: str) -> ValueError:
    """The error for a store whose files do not go together."""
    return ValueError(shortened(f"The store at '{path}' is damaged: {what}."))


def write_all(file: int, data: memoryview, position: int) -> None:
    """Writes bytes at a position of an open file."""
    while data:
        written = os.pwrite(file, data, position)
        data, position = data[written:], position + written


def make_npy(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A new file with NumPy's header, and zeros that take no space yet."""
    number = np.dtype(DTYPES[dtype])
    with path.open("xb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(number), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + math.prod(shape) * number.itemsize)


def npy_header(path: Path) -> tuple[tuple[int, ...], str, int]:
    """Shape, dtype and the offset of the numbers.

    :raises ValueError: if the file is missing, or is no array of NumPy in C order.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"version {version}")
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
            if is_fortran and len(shape) > 1:
                raise ValueError("Fortran order")
            return tuple(shape), dtype.str, file.tell()
    # NumPy's reader of headers raises errors of Python's tokenizer and parser, too.
    except (OSError, ValueError, SyntaxError, tokenize.TokenError, RecursionError, TypeError, MemoryError) as error:
        raise damaged(path.parent, f"{path.name} cannot be read ({error})") from error


def map_npy(path: Path) -> Tensor:
    """The numbers of a file as a tensor that reads them on access."""
    shape, dtype, offset = npy_header(path)
    if math.prod(shape) == 0:
        return torch.from_numpy(np.empty(shape, dtype))
    with path.open("rb") as file:
        if sys.platform == "linux":
            # Private, so that changing a tensor cannot change the file; unreserved, or a store could not be larger
            # than the memory. Python names the flag from 3.13 on.
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
            mapping = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        else:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.from_numpy(np.frombuffer(mapping, dtype, math.prod(shape), offset).reshape(shape))
