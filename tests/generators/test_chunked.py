# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The generator for large networks: the law of the other, at an eighth of the bits and in parts."""

import pytest
import torch

from pyro_apd.generators import ChunkedGenerator, CoordinateGenerator, build_generator, chunked, precision
from pyro_apd.generators.draw_blocks import DrawBlocks
from pyro_apd.generators.residual import Block
from pyro_apd.models.layout import Layout
from pyro_apd.posterior.posterior import DistilledPosterior

SIZES = (6, 120, 10)
BLOCK = Block(6, 6, 20, 4)


def chains(num_chains=2, num_draws=40):
    """Draws whose sites move by amounts that differ a thousandfold."""
    unit = torch.cat([torch.full((size,), scale) for size, scale in zip(SIZES, (1.0, 1e-3, 0.05), strict=True)])
    mixing = torch.randn(5, len(unit))
    path = torch.randn(num_chains, num_draws, 5).cumsum(1)
    return unit * (path @ mixing + 0.5 * torch.randn(num_chains, num_draws, len(unit)))


@pytest.fixture(params=[16384, 7])
def longest(request, monkeypatch):
    monkeypatch.setattr(chunked, "_CHUNK", request.param)
    return request.param


def pair(noise=(BLOCK,), rank=4, **options):
    """Both generators of the same draws, with the basis at full precision and in eight bits."""
    theta_CSD = chains()
    torch.manual_seed(5)
    whole = CoordinateGenerator.fit(theta_CSD, rank, 10, noise, **options)
    whole.fold()
    torch.manual_seed(5)
    return whole, ChunkedGenerator.fit(theta_CSD, rank, 10, noise, sizes=SIZES, **options)


def draws_of_both(whole, parts, count=50):
    """Draws of the same latents, with the same noise."""
    latent_SL = parts.latents(count, torch.zeros(()))
    generators = [torch.Generator().manual_seed(seed) for seed in chunked._seeds(latent_SL[:, -2:])]
    noise_SB = torch.stack([torch.empty(120).normal_(generator=generator) for generator in generators])
    return whole(torch.cat([latent_SL[:, : 1 + parts.rank], noise_SB], -1)), parts(latent_SL)


def test_the_law_is_that_of_the_whole_generator_but_for_rounding(longest):
    with torch.no_grad():
        expected_SD, found_SD = draws_of_both(*pair())
    error_D = (found_SD - expected_SD).square().mean(0).sqrt() / expected_SD.std(0)
    # A 127th of the largest entry of a chunk, over four coordinates. One scale for a row would lose the second site.
    assert float(error_D.max()) < 0.1
    assert float(error_D.mean()) < 0.02


def test_gradients_are_those_of_the_whole_generator(longest):
    whole, parts = pair()
    with torch.no_grad():
        for k, span in enumerate(parts._chunks):
            whole.basis[:, span] = parts._decoded(k)
        for (name, value), (_, other) in zip(
            sorted(dict(whole.noise.named_parameters()).items()), sorted(parts.noise.named_parameters()), strict=True
        ):
            assert value.shape == other.shape, name
            value.copy_(other)
    outer_SD = torch.randn(50, sum(SIZES)) / torch.tensor([1e-3] * sum(SIZES))
    for draws_SD in draws_of_both(whole, parts):
        (draws_SD * outer_SD).sum().backward()
    for name, parameter in parts.named_parameters():
        if name != "location":
            torch.testing.assert_close(parameter.grad, whole.get_parameter(name).grad, rtol=2e-3, atol=1e-2)


def test_layers_of_different_spread_keep_their_digits():
    _, parts = pair(noise=())
    decoded_RD = torch.cat([parts._decoded(k) for k in range(len(parts._chunks))], 1)
    middle_RD = decoded_RD[:, 6:126]
    as_one_row_RD = precision.decode(precision.encode({"basis": decoded_RD.repeat(20, 100)}, "int8"), "int8")["basis"]
    assert float((middle_RD != 0).float().mean()) > 0.9
    assert float((as_one_row_RD[:4, 6:126] != 0).float().mean()) < 0.1


def test_one_latent_is_one_network_and_noise_differs_between_latents():
    _, parts = pair()
    latent_SL = parts.latents(6, torch.zeros(()))
    assert latent_SL.shape == (6, 1 + parts.rank + 2)
    with torch.no_grad():
        assert torch.equal(parts(latent_SL), parts(latent_SL))
        torch.testing.assert_close(parts(latent_SL[2:3]), parts(latent_SL)[2:3])
        same_SL = latent_SL[:1].repeat(400, 1)
        same_SL[:, -2:] = torch.randn(400, 2)
        theta_SD = parts(same_SL)
    assert float(theta_SD[:, :6].std(0).max()) < 1e-6, "a site without noise"
    assert len(theta_SD[:, 6:126].unique(dim=0)) == 400
    noise_SB = theta_SD[:, 6:126] - theta_SD[:, 6:126].mean(0)
    correlation_SS = torch.corrcoef(noise_SB / noise_SB.std(0))
    assert float((correlation_SS - torch.eye(400)).abs().max()) < 0.6


@pytest.mark.parametrize("entry", [-2, -1])
def test_each_of_the_two_latents_of_noise_counts(entry):
    _, parts = pair()
    latent_SL = parts.latents(1, torch.zeros(())).repeat(2, 1)
    latent_SL[1, entry] += 1.0
    with torch.no_grad():
        theta_SD = parts(latent_SL)
    torch.testing.assert_close(theta_SD[0, :6], theta_SD[1, :6])  # rows of one product, equal but for rounding
    assert not torch.equal(theta_SD[0, 6:126], theta_SD[1, 6:126])


def test_noise_is_scaled():
    _, parts = pair()
    latent_SL = parts.latents(1, torch.zeros(())).repeat(3, 1)
    latent_SL[:, -2:] = torch.randn(3, 2)
    with torch.no_grad():
        before_SD = parts(latent_SL)
        parts.scale_noise(3.0)
        after_SD = parts(latent_SL)
    torch.testing.assert_close(after_SD.diff(dim=0), 3 * before_SD.diff(dim=0), rtol=1e-4, atol=1e-5)


def test_draws_without_gradients_are_those_with(monkeypatch):
    _, parts = pair()
    latent_SL = parts.latents(9, torch.zeros(()))
    with_gradients_SD = parts(latent_SL).detach()
    monkeypatch.setattr(chunked, "draws_per_block", lambda num_bytes: 2)
    with torch.no_grad():
        torch.testing.assert_close(parts(latent_SL), with_gradients_SD)


def test_projecting_gives_the_coordinates_back(longest):
    _, parts = pair(noise=())
    coordinates_SR = torch.randn(12, parts.rank)
    theta_SD = parts.expanded(coordinates_SR, slice(0, sum(SIZES))).detach()
    torch.testing.assert_close(parts.projected(theta_SD), coordinates_SR, rtol=1e-3, atol=1e-3)


def test_no_chunk_is_of_two_sites(longest):
    _, parts = pair()
    edges = {span.start for span in parts._chunks}
    assert {0, 6, 126} <= edges
    assert max(span.stop - span.start for span in parts._chunks) <= longest


@pytest.mark.parametrize("dtype", precision.DTYPES)
def test_a_file_keeps_the_integers_at_any_precision(tmp_path, dtype):
    layout = Layout({"a": (6,), "b": (6, 20), "c": (10,)})
    posterior = DistilledPosterior(layout, pair()[1])
    posterior.save(tmp_path / "posterior", dtype)
    again = DistilledPosterior.load(tmp_path / "posterior")
    assert again.generator.basis.dtype == torch.int8
    assert torch.equal(again.generator.basis, posterior.generator.basis)
    assert torch.equal(again.generator.get_buffer("basis#scale"), posterior.generator.get_buffer("basis#scale"))
    assert again.generator.config == posterior.generator.config
    expected, found = (p.get_samples(20, seed=1) for p in (posterior, again))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.02, atol=0.02 * float(value.abs().max()))
    again.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "posterior").read_bytes()


def test_the_config_rebuilds_it():
    _, parts = pair()
    again = build_generator(parts.config)
    again.load_state_dict(parts.state_dict())
    latent_SL = parts.latents(5, torch.zeros(()))
    assert torch.equal(again(latent_SL), parts(latent_SL))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunks": [6, 120]}, "adds up to 126"),
        ({"chunks": [1] * 20_000}, "has 20,000 entries, too many for 136 numbers"),
        ({"chunks": [6, 0, 130]}, "must be a positive integer"),
        ({"chunks": [6, 130], "noise": [[6, 6, 20, 4]]}, "does not begin and end with chunks"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        build_generator({"kind": "chunked", "output_size": 136, "rank": 2, **settings})


def test_double_precision_draws(longest):
    theta_CSD = chains().double()
    generator = ChunkedGenerator.fit(DrawBlocks(theta_CSD), 4, 10, (BLOCK,), sizes=SIZES)
    assert generator(generator.latents(3, generator.location)).dtype == torch.float64
