# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Which settings suit the draws of a chain, and few draws where these have no subspace in common."""

import math

import pytest
import torch
from torch import nn

import pyro_apd as apd
from pyro_apd.distillation.subspace_settings import Case, FewDraws, correlation_length, settings_for
from pyro_apd.generators.draw_blocks import DrawBlocks


def case(kind=FewDraws, num_chains=1, num_draws=400, size=5000, rank=None):
    return kind(DrawBlocks(torch.zeros(num_chains, num_draws, size)), [], None, rank, 0.0)


@pytest.mark.parametrize(
    ("num_chains", "num_draws", "size", "rank"),
    [
        (1, 400, 5000, 99),
        (4, 400, 5000, 24),
        (4, 400, 500, 49),  # a tiny network
        (64, 400, 5000, 12),  # at least
        (1, 30, 5000, 29),  # all draws
        (1, 400, 20, 20),  # all numbers
    ],
)
def test_few_draws_by_chain(num_chains, num_draws, size, rank):
    settings = case(num_chains=num_chains, num_draws=num_draws, size=size).default_settings()
    assert settings.rank == rank
    assert settings.segment_length == 1
    assert settings.path_rank <= rank
    assert settings.step == pytest.approx(2e-3 / math.sqrt(rank))


def test_their_number_is_as_wanted_and_grows_with_the_bytes():
    assert case(rank=7).default_settings().rank == 7
    assert case(rank=7).settings(3.0).rank == 7
    assert [case().settings(share).rank for share in (0.01, 0.5, 2.0, 100.0)] == [1, 50, 198, 399]


def test_of_all_draws_there_are_more_than_coordinates():
    assert case(Case, num_draws=60).default_settings().rank == 40
    assert case(Case).default_settings().rank == 96


def test_length_of_correlation():
    torch.manual_seed(0)
    noise_CTD = torch.randn(2, 2000, 30)
    assert correlation_length(DrawBlocks(noise_CTD)) < 0.3
    slow_CTD = noise_CTD.clone()
    for t in range(1, 2000):
        slow_CTD[:, t] = 0.9 * slow_CTD[:, t - 1] + noise_CTD[:, t]
    assert correlation_length(DrawBlocks(slow_CTD)) == pytest.approx(-1 / math.log(0.9), rel=0.1)


def test_settings_become_finer_with_the_bytes():
    steps = [settings_for(share, 20).step for share in (0.5, 1.0, 3.0)]
    assert sorted(steps, reverse=True) == steps


def independent_networks(num_draws=150):
    """Networks of 181 weights that all fit a sine, from independent hidden layers: they have no subspace in common."""
    model = apd.BNN(
        nn.Sequential(nn.Linear(1, 60), nn.Tanh(), nn.Linear(60, 1)), likelihood="gaussian", noise_scale=0.1
    )
    generator = torch.Generator().manual_seed(0)
    x_N1 = torch.linspace(-3, 3, 50).unsqueeze(1)
    weight_S = torch.randn(num_draws, 60, 1, generator=generator)
    bias_S = torch.randn(num_draws, 60, generator=generator)
    hidden_SNH = torch.tanh(x_N1 @ weight_S.mT + bias_S.unsqueeze(1))
    target_SN1 = x_N1.sin() + 0.1 * torch.randn(num_draws, 50, 1, generator=generator)
    ridge_HH = 0.01 * torch.eye(60)
    out_SH1 = torch.linalg.solve(hidden_SNH.mT @ hidden_SNH + ridge_HH, hidden_SNH.mT @ target_SN1)
    draws = {"net.0.weight": weight_S, "net.0.bias": bias_S, "net.2.weight": out_SH1.mT.contiguous()}
    draws["net.2.bias"] = 0.01 * torch.randn(num_draws, 1, generator=generator)
    return model, draws, x_N1


@pytest.mark.parametrize("settings", [{}, {"rank": 30}, {"byte_budget": 20.0}])
def test_independent_networks_are_kept_themselves(settings):
    model, draws, x = independent_networks()
    posterior = apd.distill(draws, model, data=(x, x[:, 0]), num_steps=0, seed=0, progress=False, **settings)
    generator = posterior.generator
    assert generator.num_modes == generator.rank + 1 == posterior.metadata["distinct_draws"]
    assert posterior.metadata["calibration"]["residuals"]["rows"] == pytest.approx(0, abs=0.1)
    if "rank" in settings:
        assert generator.rank == 30
    if "byte_budget" in settings:
        assert posterior.num_bytes <= 20.0 * 4 * posterior.layout.size
    # Each draw of the generator is one of the chain, up to rounding.
    found_SD = torch.cat([v.flatten(1) for v in posterior.get_samples(20).values()], 1)
    real_TD = torch.cat([draws[name].flatten(1) for name in posterior.layout.names], 1)
    nearest_S, usual = torch.cdist(found_SD, real_TD).amin(1), torch.pdist(real_TD).median()
    assert nearest_S.amax() < 0.25 * usual


def test_where_functions_are_not_known_all_draws_are_taken():
    _, draws, _ = independent_networks()
    posterior = apd.distill(draws, seed=0, num_steps=0, progress=False)
    assert posterior.generator.num_modes > posterior.generator.rank + 1
    assert "calibration" not in posterior.metadata
