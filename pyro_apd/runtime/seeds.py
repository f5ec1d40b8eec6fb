# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""One way to derive seeds: by :class:`numpy.random.SeedSequence`, from a user's seed and a path of names and numbers.

Streams of different paths are independent, whatever the seed; and nothing else decides about them, so that chain 3 of a
run draws the same numbers wherever it runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pyro_apd.runtime.checks import is_integer

# Seeds of 62 bits suit every generator of torch and NumPy.
_BITS = 62


def checked_seed(seed: Any) -> int | None:
    """``seed`` as Python's ``int``; None stays None.

    :raises ValueError: if it is neither None nor an integer from 0 to 2**64 - 1.
    """
    if seed is None:
        return None
    if not (is_integer(seed) and 0 <= seed < 2**64):
        raise ValueError(f"seed={seed!r} must be None or an integer from 0 to 2**64 - 1, such as seed=0.")
    return int(seed)


def fresh_seed() -> int:
    """A seed from torch's global generator, which moves on."""
    return int(torch.randint(2**_BITS, ()))


def seed_or_fresh(seed: Any) -> int:
    """``seed``, or where it is None :func:`fresh_seed`.

    :raises ValueError: as :func:`checked_seed`.
    """
    checked = checked_seed(seed)
    return fresh_seed() if checked is None else checked


def derived_seed(seed: int, *path: int | str) -> int:
    """The seed of a stream, an integer from 0 to 2**62 - 1.

    :param int seed: the user's, or another derived one; not negative.
    :param path: what the stream is for, such as ``"noise", 3``. Every path has a stream of its own.

    Example::

        noise = derived_seed(seed, "noise", chain)
        batches = derived_seed(seed, "batches", chain)
    """
    sequence = np.random.SeedSequence(entropy=seed, spawn_key=tuple(word for part in path for word in _words(part)))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(64 - _BITS))


def derived_generator(seed: int, *path: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of torch on ``device``, seeded with :func:`derived_seed`."""
    return torch.Generator(device=device).manual_seed(derived_seed(seed, *path))


def _words(part: int | str) -> list[int]:
    """A part of a path as words for NumPy, so that no two parts, and no two paths of them, have the same."""
    if isinstance(part, str):
        encoded = part.encode()
        return [1, len(encoded), *encoded]
    if part < 0:
        raise ValueError(f"A path's numbers must not be negative; got {part}.")
    digits = []
    while part:
        part, digit = divmod(int(part), 2**32)
        digits.append(digit)
    return [0, len(digits), *digits]
