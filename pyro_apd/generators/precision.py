# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Encodes the numbers of a generator for a file in fewer bits, and decodes them. Generators compute in ``float32``.

Every encoding is idempotent: decoded numbers are encoded into the same bits again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

#: Precisions by name. ``float32`` keeps every tensor at its own dtype.
DTYPES = ("float32", "float16", "bfloat16", "int8")

#: Appended to the name of a tensor kept in ``int8``, for the tensor of its scales: one per row. Where the generator
#: itself computes with integers, there is one per row and chunk, and both tensors are kept unchanged.
SCALE_SUFFIX = "#scale"

# For matrices with fewer entries, or with shorter rows, int8 saves too few bytes for the digits that it loses.
_MIN_ENTRIES, _MIN_COLUMNS = 2048, 16
# Rows whose largest entry is smaller are kept as zeros, since their scale would be a subnormal number.
_TINY = 2.0**-100
_LEVELS = 127
# Entries down to this share of a tensor's largest are changed by this share of themselves at most.
_SMALL, _SMALL_CHANGES = 1e-6, 2.0**-4


def check_dtype(dtype: object, name: str = "dtype") -> str:
    """``dtype``, if it is one of :data:`DTYPES`.

    :raises ValueError: if it is not.
    """
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, DTYPES))}; got {dtype!r}.")
    return dtype


def encode(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The tensors as a file keeps them: unchanged for ``"float32"``, else in fewer bits where these suffice.

    ``"int8"`` keeps each row of a large matrix as integers of -127 to 127 and one ``float32`` scale, and every other
    tensor in ``float16``. A tensor that ``float16`` cannot hold to its own resolution, since its numbers are beyond
    65,504 or all tiny, is kept in ``float32``. Integer tensors stay as they are.

    :raises ValueError: if ``dtype`` is not one of :data:`DTYPES`.
    """
    check_dtype(dtype)
    if dtype == "float32":
        return dict(tensors)
    stored: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not value.is_floating_point() or is_scale(name, tensors):
            stored[name] = value
        elif dtype == "int8" and is_large(value):
            stored[name], stored[name + SCALE_SUFFIX] = to_int8(value)
        else:
            stored[name] = _narrow(value, torch.bfloat16 if dtype == "bfloat16" else torch.float16)
    return stored


def decode(stored: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The tensors of a generator, from the result of :func:`encode`: in ``float32``, or with ``dtype="float32"`` each
    at its original dtype.

    :raises ValueError: if ``dtype`` is not one of :data:`DTYPES`.
    """
    check_dtype(dtype)
    if dtype == "float32":
        return dict(stored)
    tensors = {}
    for name, value in stored.items():
        scale = stored.get(name.removesuffix(SCALE_SUFFIX) + SCALE_SUFFIX)
        if scale is not None and is_of_chunks(scale.shape):
            tensors[name] = value
        elif name + SCALE_SUFFIX in stored:
            tensors[name] = value.float() * stored[name + SCALE_SUFFIX].float().unsqueeze(-1)
        elif not is_scale(name, stored):
            tensors[name] = value.float() if value.is_floating_point() else value
    return tensors


def is_large(value: Tensor) -> bool:
    """Whether ``int8`` keeps a tensor as integers: a matrix of 2,048 entries or more, in rows of 16 or more."""
    return value.dim() == 2 and value.numel() >= _MIN_ENTRIES and value.shape[1] >= _MIN_COLUMNS


def is_scale(name: str, stored: Mapping[str, object]) -> bool:
    """Whether ``name`` is the name of the scales of another of the tensors."""
    return name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in stored


def is_of_chunks(shape: Sequence[int]) -> bool:
    """Whether scales of this shape are ``(R, K)``, those of a generator that computes with integers."""
    return len(shape) == 2


def to_int8(value_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Integers ``(R, D)`` and scales ``(R,)``, of which ``integers * scale`` is exact in ``float32``.

    Scales have 16 significant bits, rounded up: their multiples up to 127 are then exact, and so is the way back.
    """
    value_RD = value_RD.detach().float()
    peak_R = value_RD.abs().amax(1)
    peak_R = torch.where(peak_R >= _TINY, peak_R, torch.zeros_like(peak_R))
    scale_R = ((peak_R / _LEVELS).view(torch.int32) + 0xFF & ~0xFF).view(torch.float32)
    divisor_R = torch.where(scale_R > 0, scale_R, torch.ones_like(scale_R))
    integers_RD = (value_RD / divisor_R.unsqueeze(1)).round_().clamp_(-_LEVELS, _LEVELS)
    return integers_RD.mul_((scale_R > 0).unsqueeze(1)).to(torch.int8), scale_R


def _narrow(value: Tensor, dtype: torch.dtype) -> Tensor:
    """In ``dtype`` if no entry changes by more than the resolution at the largest entry, else in float32."""
    value = value.detach()
    if value.numel() == 0:
        return value.to(dtype)
    narrow = value.to(dtype)
    error, size = (narrow.to(value.dtype) - value).abs(), value.abs()
    is_close = error.amax() <= torch.finfo(dtype).eps * size.amax()  # which NaN fails
    # Small entries may be scales: those of a few millionths of the largest would become zero.
    is_kept = (error <= _SMALL_CHANGES * size) | (size < _SMALL * size.amax())
    if bool(is_close & is_kept.all()):
        return narrow
    return value.float()
