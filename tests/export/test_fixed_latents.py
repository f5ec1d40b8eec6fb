# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Latents that programs compute are standard normal, independent, and the same everywhere."""

import torch

from pyro_apd.export.fixed_latents import fixed_latents, keys, mixed, normals
from tests.support.exported import low_rank_posterior, mlp, subspace_posterior


def table(num_draws=300, count=2001, seed=0):
    return torch.stack([normals(key, count) for key in keys(num_draws, seed)])


def test_numbers_are_standard_normal():
    values = table().flatten().double()
    assert len(values) == 300 * 2001
    assert abs(values.mean()) < 4 / len(values) ** 0.5
    assert abs(values.var() - 1) < 4 * (2 / len(values)) ** 0.5
    assert abs((values**4).mean() - 3) < 4 * (96 / len(values)) ** 0.5
    expected = torch.special.ndtr(values.sort().values)
    gap = (expected - (torch.arange(len(values)) + 0.5) / len(values)).abs().max()
    assert gap < 1.95 / len(values) ** 0.5  # Kolmogorov and Smirnov, one in a thousand


def test_draws_and_places_are_not_correlated():
    values = table() / table().std()
    for rows in (values, values.square() - 1):
        rows = rows / rows.std()
        for matrix, count in ((rows @ rows.T, 2001), (rows.T @ rows, 300)):
            others = matrix[~torch.eye(len(matrix), dtype=torch.bool)] / count
            assert abs(others.std() * count**0.5 - 1) < 0.05
    assert abs((values[:, 1:] * values[:, :-1]).mean()) < 4 / values.numel() ** 0.5


def test_integers_are_those_of_any_platform():
    """Python's own integers."""
    value = 12345
    for shift, factor in ((16, 0x7FEB352D), (15, 0x31848BAB)):
        value = ((value ^ value >> shift) * factor) % 2**32
    assert int(mixed(torch.tensor(12345))) == value ^ value >> 16
    assert len(set(mixed(torch.arange(10_000)).tolist())) == 10_000
    assert int(mixed(torch.tensor(2**32 - 1))) < 2**32


def test_seeds_and_draws_differ():
    posterior, _ = low_rank_posterior(mlp())
    first, again, other = (fixed_latents(posterior.generator, 5, seed) for seed in (0, 0, 2**32))
    assert first.shape == (5, posterior.latent_size)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.isclose(first, other).all(0).any()
    assert len(first.unique(dim=0)) == 5
    # More draws go on where fewer stop.
    torch.testing.assert_close(fixed_latents(posterior.generator, 9)[:5], first, rtol=0, atol=0)


def test_chains_and_modes_are_evenly_used():
    posterior, _ = subspace_posterior()
    chain_SC, _ = posterior.generator.coordinates(fixed_latents(posterior.generator, 8))
    assert chain_SC.sum(0).tolist() == [4, 4]
    quantile_S = torch.special.ndtr(fixed_latents(posterior.generator, 8)[:, 0])
    torch.testing.assert_close(quantile_S, (torch.arange(4).repeat_interleave(2) + 0.5) / 4)
