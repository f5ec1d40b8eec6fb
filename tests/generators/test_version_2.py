# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Generators of earlier files; what they draw from such files is in ``tests/posterior/test_stored_files.py``."""

import pytest
import torch

from pyro_apd.generators import build_generator

COORDINATES = {"kind": "coordinates", "output_size": 7, "rank": 2, "num_modes": 2, "noise": [[1, 2, 3, 1]]}
CHUNKED = {**COORDINATES, "kind": "chunked", "chunks": [1, 6]}


def filled(config, seed=0):
    generator = build_generator(config).double().requires_grad_(False)
    random = torch.Generator().manual_seed(seed)
    for value in generator.state_dict().values():
        numbers = torch.randn(value.shape, generator=random, dtype=torch.float64)
        value.copy_(numbers if value.is_floating_point() else (40 * numbers).clamp(-127, 127))
    return generator


def test_a_draw_is_the_formula():
    generator = filled({**COORDINATES, "bend": 3, "num_scales": 1})
    latent_L = torch.linspace(-1, 1, generator.latent_size, dtype=torch.float64)  # below its median: the first mode
    z_R = generator.mode_location[0] + generator.mode_scale[0] @ latent_L[1:3]
    z_R = z_R + generator.bend(z_R)
    noise = generator.noise[0]
    e_OI = latent_L[3:].view(2, 3)
    e_OI = e_OI - (e_OI @ noise.directions.mT * noise.damping) @ noise.directions
    expected_D = generator.location + z_R @ generator.basis
    expected_D[1:] += (noise.row_scale[:, None] * e_OI * noise.column_scale).flatten()
    torch.testing.assert_close(generator(latent_L[None])[0], expected_D)


def test_chunks_have_scales_and_their_noise_a_seed():
    generator = filled(CHUNKED)
    generator.noise[0].row_scale.zero_()
    latent_SL = torch.randn(4, 5, dtype=torch.float64)
    scale_RK = generator.get_buffer("basis#scale")
    basis_RD = generator.basis * scale_RK.repeat_interleave(torch.tensor([1, 6]), 1)
    torch.testing.assert_close(generator(latent_SL), generator.location + generator.coordinates(latent_SL) @ basis_RD)
    generator.noise[0].row_scale.fill_(1.0)
    other_SL = latent_SL.clone()
    other_SL[:, -1] += 1
    assert torch.equal(generator(latent_SL), generator(latent_SL))
    assert (generator(latent_SL)[:, 0] == generator(other_SL)[:, 0]).all()
    assert (generator(latent_SL)[:, 1:] != generator(other_SL)[:, 1:]).all()


def test_latents_are_spread_over_modes():
    generator = build_generator({**COORDINATES, "num_modes": 4})
    latent_SL = generator.latents(40, torch.zeros(()))
    place_S = torch.special.ndtr(latent_SL[:, 0]) * 4
    assert place_S.long().bincount().tolist() == pytest.approx([10] * 4, abs=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"bend": -1}, "bend"),
        ({"width": 3}, "no longer supported"),
        ({"noise": [[1, 2, 3]]}, "start, rows, columns, rank"),
        ({"noise": [[1, 2, 3, 4]]}, "rank <= columns"),
        ({"noise": [[2, 2, 3, 1]]}, "reaches beyond the 7"),
        ({"noise": [[0, 1, 3, 1], [2, 1, 3, 1]]}, "must not overlap"),
        ({"kind": "chunked", "chunks": [1, 5]}, "adds up to 6"),
        ({"kind": "chunked", "chunks": [7, 0]}, "chunk"),
        ({"kind": "chunked", "chunks": [2, 5]}, "does not begin and end with chunks"),
        ({"kind": "chunked", "chunks": [1] * 20_000}, "20,000 entries, too many"),
        ({"kind": "chunked"}, "not those of a 'chunked' generator"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        build_generator({**COORDINATES, **settings})
