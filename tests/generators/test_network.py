# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The generators: exact at the start, one latent one network, rebuilt from their config."""

import json

import pytest
import torch

from pyro_apd.generators import GENERATORS, ChunkedGenerator, CoordinateGenerator, PaperGenerator, build_generator
from pyro_apd.generators.residual import Block


def chains(num_chains=3, num_draws=40, size=6, dtype=torch.float64):
    """Chains with means and covariances of their own."""
    mixing = torch.randn(num_chains, size, size, dtype=dtype)
    centre = 4 * torch.randn(num_chains, 1, size, dtype=dtype)
    return centre + torch.randn(num_chains, num_draws, size, dtype=dtype) @ mixing


def moments(generator):
    """Mean and covariance of what a generator at its start draws, from its parameters."""
    generator.fold()
    location_MR, covariance_CRR = generator.mode_location, generator.mode_scale @ generator.mode_scale.mT
    covariance_MRR = covariance_CRR.repeat_interleave(len(location_MR) // len(covariance_CRR), dim=0)
    mean_R = location_MR.mean(0)
    second_RR = (covariance_MRR + location_MR.unsqueeze(-1) * location_MR.unsqueeze(-2)).mean(0)
    covariance_RR = second_RR - torch.outer(mean_R, mean_R)
    return generator.location + mean_R @ generator.basis, generator.basis.mT @ covariance_RR @ generator.basis


def test_the_start_has_mean_and_covariance_of_all_draws():
    theta_CSD = chains()
    with torch.no_grad():
        mean_D, covariance_DD = moments(CoordinateGenerator.fit(theta_CSD, rank=6))
    theta_SD = theta_CSD.flatten(0, 1)
    torch.testing.assert_close(mean_D, theta_SD.mean(0))
    torch.testing.assert_close(covariance_DD, torch.cov(theta_SD.mT, correction=0))


def test_the_start_keeps_the_covariance_in_the_span_it_retains():
    theta_SD = chains().flatten(0, 1)
    theta_SD = (theta_SD - theta_SD.mean(0)) / theta_SD.std(0, correction=0)  # the units in which directions are chosen
    with torch.no_grad():
        generator = CoordinateGenerator.fit(chains_of := theta_SD.unflatten(0, (3, 40)), rank=3)
        _, covariance_DD = moments(generator)
    assert chains_of.shape == (3, 40, 6)
    span_RD = torch.linalg.qr(generator.basis.detach().mT).Q.mT
    expected = span_RD @ torch.cov(theta_SD.mT, correction=0) @ span_RD.mT
    torch.testing.assert_close(span_RD @ covariance_DD @ span_RD.mT, expected)


def test_each_mode_is_the_gaussian_of_its_chain():
    theta_CSD = chains()
    generator = CoordinateGenerator.fit(theta_CSD, rank=6)
    latent_SL = torch.randn(90_000, generator.latent_size, dtype=torch.float64)
    with torch.no_grad():
        theta_SD, mode_S = generator(latent_SL), generator.mode(latent_SL)
    for chain, expected_SD in enumerate(theta_CSD):
        drawn_SD = theta_SD[mode_S == chain]
        assert len(drawn_SD) == pytest.approx(30_000, rel=0.03)
        scale = expected_SD.std()
        assert (drawn_SD.mean(0) - expected_SD.mean(0)).abs().max() < 0.05 * scale
        difference = torch.cov(drawn_SD.mT) - torch.cov(expected_SD.mT, correction=0)
        assert difference.abs().max() < 0.1 * scale**2


def test_the_perceptron_is_zero_at_the_start_but_trainable():
    generator = CoordinateGenerator.fit(chains(), rank=2)
    generator(torch.randn(8, 3, dtype=torch.float64)).square().sum().backward()
    assert not generator.bend[-1].weight.any()
    assert generator.bend[-1].weight.grad.abs().sum() > 0
    assert CoordinateGenerator.fit(chains(), rank=2, mlp_width=0).bend is None


@pytest.mark.parametrize("stretch", [4, 10, 39, 40, 100])
def test_the_start_has_mean_and_covariance_of_all_draws_in_stretches_too(stretch):
    """The law of total variance: within stretches and between them. Exact where stretches are of equal length."""
    theta_CSD = chains()
    with torch.no_grad():
        generator = CoordinateGenerator.fit(theta_CSD, rank=6, segment_length=stretch)
        assert (generator.num_modes, len(generator.mode_scale)) == (3 * max(1, 40 // stretch), 3)
        mean_D, covariance_DD = moments(generator)
    theta_SD = theta_CSD.flatten(0, 1)
    torch.testing.assert_close(mean_D, theta_SD.mean(0))
    torch.testing.assert_close(covariance_DD, torch.cov(theta_SD.mT, correction=0))


def test_stretches_follow_a_path_where_one_gaussian_does_not():
    """A chain along half a circle: a Gaussian puts draws inside, where the chain never was."""
    angle_S = torch.linspace(0, torch.pi, 240, dtype=torch.float64)
    theta_SD = torch.stack([angle_S.cos(), angle_S.sin()], 1) + 0.02 * torch.randn(240, 2, dtype=torch.float64)
    off = {}
    for name, stretch in (("one", None), ("many", 12)):
        generator = CoordinateGenerator.fit(theta_SD[None], rank=2, segment_length=stretch)
        with torch.no_grad():
            drawn_SD = generator(generator.latents(500, theta_SD))
        off[name] = float((drawn_SD.norm(dim=1) - 1).abs().mean())
    assert off["one"] > 0.2
    assert off["many"] < 0.04


def test_modes_are_in_order_of_time_and_chain_and_share_their_chains_covariance():
    theta_CSD = chains(num_chains=2, num_draws=20)
    generator = CoordinateGenerator.fit(theta_CSD, rank=6, segment_length=5)
    generator.fold()
    latent_SL = torch.zeros(8, generator.latent_size, dtype=torch.float64)
    latent_SL[:, 0] = torch.special.ndtri((torch.arange(8, dtype=torch.float64) + 0.5) / 8)
    with torch.no_grad():
        assert generator.mode(latent_SL).tolist() == list(range(8))
        torch.testing.assert_close(generator(latent_SL), theta_CSD.unflatten(1, (4, 5)).mean(2).flatten(0, 1))
        # A latent entry moves draws of one chain alike, and those of the other by another covariance.
        moved_SD = generator(latent_SL.index_fill(1, torch.tensor([1]), 1.0)) - generator(latent_SL)
    torch.testing.assert_close(moved_SD[:4], moved_SD[:1].expand(4, -1))
    torch.testing.assert_close(moved_SD[4:], moved_SD[4:5].expand(4, -1))
    assert (moved_SD[0] - moved_SD[4]).abs().max() > 0.1


def test_a_config_with_a_setting_out_of_use_still_builds():
    """Files written before it was dropped say that it is not in use."""
    old = {"kind": "coordinates", "output_size": 7, "rank": 3, "num_modes": 2, "num_scales": 2, "width": 0, "bend": 8}
    generator = build_generator(old)
    assert generator.mlp_width == 8
    assert set(generator.state_dict()) > {"bend.0.weight", "bend.4.bias"}
    assert generator.config == {name: value for name, value in old.items() if name != "width"}
    with pytest.raises(ValueError, match="width > 0 are no longer supported"):
        build_generator({**old, "width": 8})


def test_a_chain_that_moved_in_fewer_directions_than_the_others():
    theta_CSD = chains()
    theta_CSD[1] = theta_CSD[1, :1]
    generator = CoordinateGenerator.fit(theta_CSD, rank=6)
    latent_SL = torch.randn(200, 7, dtype=torch.float64)
    latent_SL[:, 0] = 0.0
    assert torch.isfinite(generator(latent_SL)).all()
    torch.testing.assert_close(generator(latent_SL), theta_CSD[1, :1].expand(200, -1))


def test_one_latent_is_one_network():
    generator = CoordinateGenerator.fit(chains(), rank=4)
    latent_SL = torch.randn(10, 5, dtype=torch.float64)
    together, alone = generator(latent_SL), torch.cat([generator(latent_L[None]) for latent_L in latent_SL])
    torch.testing.assert_close(together, alone)


def test_extreme_latents_stay_in_a_mode():
    generator = CoordinateGenerator(3, 2, num_modes=4)
    latent_SL = torch.tensor([[-40.0, 0.0, 0.0], [40.0, 0.0, 0.0]])
    assert generator.mode(latent_SL).tolist() == [0, 3]


def test_folding_the_units_changes_no_draw():
    generator = CoordinateGenerator.fit(chains(), rank=4, noise=[Block(1, 2, 2, 1)])
    latent_SL = torch.randn(9, generator.latent_size, dtype=torch.float64)
    expected = generator(latent_SL)
    generator.fold()
    torch.testing.assert_close(generator(latent_SL), expected)


def test_noise_supplies_the_variance_that_few_coordinates_leave_out():
    """In two directions out of nine; the rest of a block of two independent rows is noise."""
    theta_CSD = torch.randn(1, 400, 9, dtype=torch.float64) * torch.tensor([9.0, 5.0, 1, 1, 1, 1, 1, 1, 1.0])
    plain = CoordinateGenerator.fit(theta_CSD, rank=2)
    noisy = CoordinateGenerator.fit(theta_CSD, rank=2, noise=[Block(3, 2, 3, 3)])
    left_out = [g(torch.randn(4000, g.latent_size, dtype=torch.float64)).var(0)[3:].mean() for g in (plain, noisy)]
    assert left_out[0] < 0.6
    assert left_out[1].item() == pytest.approx(1.0, rel=0.15)


def test_a_batch_to_train_on_has_every_mode_equally_often():
    generator = CoordinateGenerator.fit(chains(), rank=2)
    latent_SL = generator.latents(4001, torch.empty(0, dtype=torch.float64))
    assert latent_SL.shape == (4001, 3)
    counts = torch.bincount(generator.mode(latent_SL))
    assert len(counts) == generator.num_modes
    assert counts.max() - counts.min() <= 2  # either end of a mode may cut a stratum in two
    # Evenly along chains as well, where a mode is a stretch of one; in random order.
    quantile_S = torch.special.ndtr(latent_SL[:, 0])
    counts = torch.histc(quantile_S, 50, 0, 1)
    assert (counts - 4001 / 50).abs().max() < 2
    assert torch.corrcoef(torch.stack([quantile_S[1:], quantile_S[:-1]]))[0, 1].abs() < 0.06
    # All together, they are standard normal all the same.
    assert latent_SL[:, 0].mean().abs() < 0.06
    assert latent_SL[:, 0].std().item() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(
    "original",
    [
        CoordinateGenerator(7, 3, 2),
        CoordinateGenerator(7, 3, 2, mlp_width=8, noise=[(1, 2, 3, 2)]),
        CoordinateGenerator(7, 3, 6, num_scales=2, mlp_width=4),
        PaperGenerator(7, latent_size=4, width=5),
    ],
)
def test_config_and_state_rebuild_the_generator(original):
    rebuilt = build_generator(json.loads(json.dumps(original.config)))
    rebuilt.load_state_dict(original.state_dict())
    latent_SL = torch.randn(6, original.latent_size)
    assert torch.equal(rebuilt(latent_SL), original(latent_SL))
    assert original(latent_SL).shape == (6, original.output_size)


def test_the_papers_sizes():
    generator = PaperGenerator(79_510)
    assert sum(parameter.numel() for parameter in generator.parameters()) == 8_054_010


def test_building_on_meta_allocates_nothing():
    with torch.device("meta"):
        generator = build_generator({"kind": "coordinates", "output_size": 10**12, "rank": 3})
    assert all(value.is_meta for value in generator.state_dict().values())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "Unknown generator None"),
        ({"kind": "gan"}, "Unknown generator 'gan'"),
        ({"kind": ["paper"]}, "Unknown generator"),
        ({"kind": "paper"}, "not those of a 'paper' generator"),
        ({"kind": "coordinates", "output_size": 3, "rank": 2, "depth": 9}, "not those of a 'coordinates' generator"),
        ({"kind": "coordinates", "output_size": 3, "rank": 0}, "rank=0"),
        ({"kind": "coordinates", "output_size": 3, "rank": 2, "num_scales": 0}, "num_scales=0"),
        ({"kind": "coordinates", "output_size": 3, "rank": 2, "bend": -1}, "mlp_width=-1"),
        ({"kind": "coordinates", "output_size": 3, "rank": 2, "width": 1.5}, "width > 0"),
        ({"kind": "coordinates", "output_size": 3, "rank": 2, "noise": [[0, 2, 2, 1]]}, "reaches beyond the 3"),
        ({"kind": "paper", "output_size": True}, "output_size=True"),
        ({"kind": "paper", "output_size": 3, "width": 2.0}, "width=2.0"),
    ],
)
def test_configs_that_describe_no_generator(config, message):
    with pytest.raises(ValueError, match=message):
        build_generator(config)


def test_every_generator_is_documented():
    assert all(generator.__doc__ for generator in GENERATORS.values())


def test_the_bound_of_draws_holds_before_units_are_folded_too():
    generator = CoordinateGenerator.fit(1e3 * chains(), 3, 10, (Block(0, 2, 3, 1),))
    latent_SL = 8 * torch.randn(500, generator.latent_size, dtype=torch.float64).clamp(-1, 1)
    for _ in range(2):
        with torch.no_grad():
            assert float(generator(latent_SL).abs().max()) <= generator.bound()
        generator.fold()


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ([[0, 2, 3, 1], [5, 1, 1, 1]], "must not overlap"),
        ([[3, 1, 1, 1], [0, 1, 1, 1]], "must be in order"),
        ([[0, 1, 1, 1]] * 2, "must not overlap"),
    ],
)
def test_blocks_of_noise_are_in_order(noise, message):
    with pytest.raises(ValueError, match=message):
        CoordinateGenerator(6, 2, 1, noise)
    with pytest.raises(ValueError, match=message):
        ChunkedGenerator(6, 2, [1] * 6, 1, noise)
