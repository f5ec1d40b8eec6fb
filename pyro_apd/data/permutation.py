# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A shuffle without a table: pseudo-random permutations that are evaluated where they are needed.

A shuffled list of a billion rows takes 8 GB and half a minute, for each chain and epoch. A Feistel network is a
permutation whatever its round function does, and costs the same few operations at every position.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

#: Rounds: four make a Feistel network pseudo-random to who sees a few values (Luby & Rackoff 1988); an epoch shows all.
ROUNDS = 8

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

Positions = npt.NDArray[np.uint64]


class Permutation:
    """A pseudo-random permutation of ``0, ..., size - 1``, in constant memory.

    A number below a b is written as (l, r) with l < a and r < b. Rounds add a hash of one half to the other, modulo a
    and b in turn, which permutes the a b numbers (the network Fe[r, a, b] of Black & Rogaway, *Ciphers with arbitrary
    finite domains*, 2002, section 5). a and b are chosen next to the square root of the size, so that less than about
    one number in ``sqrt(size)`` is one too many; who lands there goes on to where that number is sent, until he is
    inside (*cycle walking*, section 4), which leaves a permutation of those inside.

    :param int size: N, from 1 to 2^62.
    :param int key: decides which permutation; only its lowest 64 bits count.
    :param int number: of the permutation under that key, such as an epoch.
    :raises ValueError: if ``size`` is out of range.
    """

    def __init__(self, size: int, key: int, number: int = 0) -> None:
        if not 1 <= size <= 2**62:
            raise ValueError(f"size={size!r} must be an integer from 1 to 2**62.")
        self.size = size
        self._a = math.isqrt(size - 1) + 1
        self._b = -(-size // self._a)
        start = _mixed(_mixed(key & _MASK) + number & _MASK)
        self._keys = [_mixed(start + (i + 1) * _GOLDEN & _MASK) for i in range(ROUNDS)]

    def __call__(self, positions: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """What stands at ``positions``, integers from 0 to N - 1 in any shape, which the result has, too."""
        given = np.asarray(positions)
        at = self._permuted(given.astype(np.uint64).reshape(-1))
        outside = np.flatnonzero(at >= self.size)
        while len(outside):
            at[outside] = self._permuted(at[outside])
            outside = outside[at[outside] >= self.size]
        return at.astype(np.int64).reshape(given.shape)

    def _permuted(self, numbers: Positions) -> Positions:
        right, left = np.divmod(numbers, np.uint64(self._a))
        for i, key in enumerate(self._keys):
            if i % 2 == 0:
                left = _sum(left, right, key, self._a)
            else:
                right = _sum(right, left, key, self._b)
        return right * np.uint64(self._a) + left


def _sum(half: Positions, other: Positions, key: int, modulus: int) -> Positions:
    """``half`` plus a hash of ``other``, modulo ``modulus``, which is at most 2^31."""
    # The finalizer of SplitMix64 (Steele, Lea & Flood 2014); its upper half, scaled, is a number below the modulus.
    z = other + np.uint64(1)
    z *= np.uint64(_GOLDEN)
    z ^= np.uint64(key)
    z ^= z >> np.uint64(30)
    z *= np.uint64(_FIRST)
    z ^= z >> np.uint64(27)
    z *= np.uint64(_SECOND)
    z >>= np.uint64(32)
    z *= np.uint64(modulus)
    z >>= np.uint64(32)
    z += half
    reduced: Positions = np.minimum(z, z - np.uint64(modulus))  # a difference below zero is a very large number
    return reduced


def _mixed(z: int) -> int:
    """SplitMix64's finalizer of one number."""
    z = (z ^ (z >> 30)) * _FIRST & _MASK
    z = (z ^ (z >> 27)) * _SECOND & _MASK
    return z ^ (z >> 31)
