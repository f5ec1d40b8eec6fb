# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Latents that a program computes for itself, so that a file of fixed networks need not hold them.

A draw takes a normal number for each weight, or more. Here they are a function of the seed, the number of the draw and
the place in the latent: integer arithmetic that every platform does exactly, then the transform of Box and Muller.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_apd.generators import Generator, SubspaceGenerator

_MASK = 0xFFFFFFFF
# Below 2^31, so that products of 32 and 31 bits fit into 64.
_FACTORS = (0x7FEB352D, 0x31848BAB)
_SHIFTS = (16, 15, 16)
# A uniform number is an odd multiple of 2^-24, which float32 holds exactly.
_DROPPED_BITS, _UNIT = 9, 2.0**-23


def fixed_latents(generator: Generator, num_draws: int, seed: int = 0) -> Tensor:
    """Latents ``(S, L)`` of the networks of an exported posterior whose latents are fixed.

    :param Generator generator: whose latents they are.
    :param int num_draws: S.
    :param int seed: of the export.

    Example::

        latent_SL = fixed_latents(posterior.generator, 100)
        networks = posterior.sample(latent=latent_SL)
    """
    head_SH, key_S = heads(generator, num_draws, seed), keys(num_draws, seed)
    count = generator.latent_size - head_SH.shape[1]
    return torch.stack([torch.cat([head, normals(key, count)]) for head, key in zip(head_SH, key_S, strict=True)])


def heads(generator: Generator, num_draws: int, seed: int) -> Tensor:
    """First entries of the latents ``(S, H)``, which a file holds.

    Of a :class:`~pyro_apd.generators.SubspaceGenerator`, the quantile that chooses chain and mode: evenly spread, and
    in the middle between two modes' bounds, where no rounding changes the choice. Of others, none.
    """
    if not isinstance(generator, SubspaceGenerator):
        return torch.zeros(num_draws, 0)
    modes = generator.num_chains * generator.num_modes
    offset = float(mixed(torch.tensor(seed & _MASK))) / (_MASK + 1)
    place_S = (torch.arange(num_draws, dtype=torch.float64) + offset) / num_draws
    mode_S = (place_S * modes).floor().clamp(max=modes - 1)
    quantile_S: Tensor = torch.special.ndtri((mode_S + 0.5) / modes)
    return quantile_S.float().unsqueeze(1)


def keys(num_draws: int, seed: int) -> Tensor:
    """One integer of 32 bits per draw ``(S,)``, from which its normal numbers follow."""
    seed_hash = mixed(torch.tensor(seed & _MASK) ^ (seed >> 32 & _MASK))
    return mixed(mixed(torch.arange(num_draws, dtype=torch.int64)) + seed_hash & _MASK)


def normals(key: Tensor, count: int) -> Tensor:
    """Standard normal numbers ``(count,)`` of a key, at most 5.8."""
    half = (count + 1) // 2
    place_P = mixed(torch.arange(2 * half, dtype=torch.int64, device=key.device))
    uniform_P = ((mixed(place_P ^ key) >> _DROPPED_BITS).to(torch.float32) + 0.5) * _UNIT
    radius_H = torch.sqrt(-2.0 * torch.log(uniform_P[:half]))
    angle_H = 2.0 * math.pi * uniform_P[half:]
    return torch.cat([radius_H * torch.cos(angle_H), radius_H * torch.sin(angle_H)])[:count]


def mixed(value: Tensor) -> Tensor:
    """Integers of 32 bits, permuted so that neighbours have nothing in common: two rounds of multiplication and
    exclusive or, as in MurmurHash3 (Appleby, 2011). They are in ``int64``."""
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        value = value ^ (value >> shift)
        value = value * factor & _MASK
    return value ^ (value >> _SHIFTS[-1])
