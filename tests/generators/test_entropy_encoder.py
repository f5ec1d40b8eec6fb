# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Sizes of codes are known without them, and a code takes little memory beside its tensors."""

import hashlib

import numpy as np
import pytest
import torch

from pyro_apd.generators import entropy_tables
from pyro_apd.generators.entropy_encoder import encode, encoded_size

EMPTY = torch.zeros(0, 4, dtype=torch.int8)


def wide(dtype, *shape, seed=0):
    """Integers of very different sizes by row, some of which have plain bits, and some of which are written in full.

    They are the same on every machine, as normal numbers are not.
    """
    values = np.random.default_rng(seed).integers(-(2**15), 2**15, shape)
    shifts = np.arange(len(values)).reshape(-1, *[1] * (len(shape) - 1)) * 15 // len(values)
    limits = torch.iinfo(dtype)
    return torch.as_tensor((values >> shifts).clip(limits.min, limits.max)).to(dtype)


@pytest.mark.parametrize("block", [64, 2**18])
@pytest.mark.parametrize(
    "tensors",
    [
        [],
        [EMPTY],
        [wide(torch.int16, 9, 40, 31)],
        [EMPTY, wide(torch.int16, 30), EMPTY, wide(torch.int8, 5, 2, 7, 3), wide(torch.int16, 12, 50), EMPTY],
    ],
)
def test_the_size_of_a_code_is_known_without_it(tensors, block, monkeypatch):
    monkeypatch.setattr(entropy_tables, "_BLOCK", block)
    assert encoded_size(tensors) == len(encode(tensors))


def test_a_code_is_what_it_was():
    """Of files that were written before."""
    code = encode([wide(torch.int16, 9, 40, 31), EMPTY, wide(torch.int8, 6, 50)])
    assert hashlib.sha256(code).hexdigest()[:16] == "c80720ab316d06ce"
