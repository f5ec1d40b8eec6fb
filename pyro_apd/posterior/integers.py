# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Integers of a generator in a file: all in one entropy code, whose size bounds what is decoded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_apd.generators.entropy_code import Coded, decode, encode, encoded_size, shares
from pyro_apd.runtime.tensor_file import Entry

#: Name of the code in a file.
CODE_NAME = "pyro_apd#integers"

# Dtypes of the integers in it, as files name them; others are kept as tensors of their own.
_CODES = {torch.int8: "I8", torch.int16: "I16"}
# Integers that a code may hold: by byte of it, and in any file. What would be more is written without a code.
_PER_BYTE, _ALWAYS = 16, 2**20


def packed(own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a file keeps them, with integers of the generator in a code.

    :param own: tensors of the generator.
    :param stored: the same at the precision of the file.
    """
    names = _integers(own)
    if not names:
        return dict(stored)
    code = torch.frombuffer(bytearray(encode([own[name] for name in names])), dtype=torch.uint8)
    if sum(own[name].numel() for name in names) > _accepted(len(code)):
        return dict(stored)
    return {CODE_NAME: code, **{name: value for name, value in stored.items() if name not in names}}


def packed_sizes(own: Mapping[str, Tensor], stored: Mapping[str, Tensor], always_coded: bool = False) -> list[int]:
    """Bytes of each tensor that :func:`packed` returns, none of which it makes.

    :param bool always_coded: count the code also where it would hold too many integers to be written: bytes then grow
        with finer steps, as those of a file may not.
    """
    names = _integers(own)
    size = encoded_size([own[name] for name in names]) if names else 0
    is_coded = bool(names) and (always_coded or sum(own[name].numel() for name in names) <= _accepted(size))
    kept = [value for name, value in stored.items() if not is_coded or name not in names]
    return [value.numel() * value.element_size() for value in kept] + ([size] if is_coded else [])


def decoded_table(table: Mapping[str, Entry], expected: Mapping[str, Tensor]) -> dict[str, Entry]:
    """A file's table with the integers of its code, none of which is decoded yet.

    :param expected: tensors of the generator, of which shapes and dtypes are taken.
    :raises ValueError: if the code is too short for them.
    """
    if CODE_NAME not in table:
        return dict(table)
    code, names = table[CODE_NAME], _integers(expected)
    if code.code != "U8" or len(code.shape) != 1:
        raise ValueError(f"tensor '{CODE_NAME}' is {code.code} of shape {code.shape}")
    twice = [name for name in names if name in table]
    if twice or not names:
        raise ValueError(f"it has a code of integers, and integers without it are {twice[:3] or 'not described'}")
    count = sum(expected[name].numel() for name in names)
    if count > _accepted(code.shape[0]):
        raise ValueError(f"a code of {code.shape[0]:,} bytes is stated to hold {count:,} integers, too many for it")
    found = {name: entry for name, entry in table.items() if name != CODE_NAME}
    return found | {name: Entry(_CODES[expected[name].dtype], tuple(expected[name].shape), 0, 0) for name in names}


def unpacked(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of :func:`packed`.

    :param expected: as of :func:`decoded_table`; without any, the code stays as it is.
    :raises ValueError: if the code is damaged.
    """
    found = dict(tensors)
    if CODE_NAME not in found or not expected:
        return found
    code = found.pop(CODE_NAME).numpy().tobytes()
    return found | dict(zip(_integers(expected), decode(code, _coded(expected)), strict=True))


def sizes(code: Tensor, expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Bytes of a code that each tensor takes, by name; parameters and errors as of :func:`unpacked`."""
    return dict(zip(_integers(expected), shares(code.numpy().tobytes(), _coded(expected)), strict=True))


def _coded(expected: Mapping[str, Tensor]) -> list[Coded]:
    return [Coded(tuple(expected[name].shape), expected[name].dtype) for name in _integers(expected)]


def _integers(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(name for name, value in tensors.items() if value.dtype in _CODES)


def _accepted(num_bytes: int) -> int:
    return _ALWAYS + _PER_BYTE * num_bytes
