# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A draw is the formula in the docstring of the generator, whatever the chain, dtype and blocks of rows."""

import json
import pickle

import pytest
import torch

from pyro_apd.generators import SubspaceGenerator, build_generator, weight_matrices
from pyro_apd.generators.subspace import capped, reduced

NORMAL = torch.distributions.Normal(0.0, 1.0)


def make(matrices=((0, 3, 4, 12, 0, 2), (17, 2, 3, -1, 1, 3)), size=24, num_chains=2, num_modes=2, rank=3, path_rank=2):
    """Two matrices, the first with a null part and a bias, the second whole and transposed, and three numbers more."""
    generator = SubspaceGenerator(size, matrices, num_chains, num_modes, rank, path_rank).double().requires_grad_(False)
    values = torch.Generator().manual_seed(0)
    for tensor in generator.state_dict().values():
        random = torch.randn(tensor.shape, generator=values, dtype=torch.float64)
        tensor.copy_(0.3 * random.abs() + 0.1 if tensor.is_floating_point() else (3 * random).round().clamp(-127, 127))
    return generator


def latent_of(generator, mode, seed=0):
    """A latent of one mode of all chains."""
    latent_L = torch.randn(generator.latent_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    count = generator.num_chains * generator.num_modes
    latent_L[0] = NORMAL.icdf(torch.tensor((mode + 0.5) / count, dtype=torch.float64))
    return latent_L


def pinned_of(generator, part, chain, z_R, e_OK):
    """Pinned coordinates in units of weights."""
    basis_ROK = reduced(part.basis.double(), part.reduction).unflatten(0, (generator.num_chains, -1))[chain]
    noise_OK = capped(part.noise_rows[:, None] * part.noise_columns, generator.noise_cap)
    values_OK = generator.step * (part.mean[chain].double() / 2 + torch.einsum("r,rok->ok", z_R, basis_ROK))
    return (values_OK + noise_OK * e_OK) / part.unit


def rows_of(generator, part, chain, z_R, latent_L):
    """Rows of a matrix, ``(O, I)``, by the formula, number by number of its settings."""
    units, pinned, columns = part.matrix.units, len(part.frame), part.matrix.columns
    e_OK, e_OI = latent_L[: units * pinned].view(units, pinned), latent_L[units * pinned :]
    z_OK = pinned_of(generator, part, chain, z_R, e_OK)
    frame_KI = part.frame_step * part.frame.double()
    dual_KI = torch.linalg.pinv(frame_KI).mT
    if pinned == columns:
        return z_OK @ dual_KI
    null_POI = reduced(part.null.double(), part.null_reduction).unflatten(0, (generator.num_chains, -1))[chain]
    u_OI = part.null_step * (null_POI[0] + torch.einsum("r,roi->oi", z_R[: generator.path_rank], null_POI[1:]))
    u_OI = u_OI + part.null_rows[:, None] * part.null_columns * e_OI.view(units, columns)
    return u_OI + (z_OK - u_OI @ frame_KI.mT) @ dual_KI


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_a_draw_is_the_formula(mode):
    generator, chain = make(), mode // 2
    latent_L = latent_of(generator, mode)
    z_R = generator.modes[mode] + generator.spread[chain] * latent_L[1:4]
    first, second, before, after = generator.parts_in_order()
    sizes = [part.latent_size for part in (first, second, before, after)]
    assert sizes == [3 * (2 + 5), 2 * 3, 2, 1]
    own = latent_L[4:].split(sizes)
    expected_D = torch.empty(24, dtype=torch.float64)
    rows_OI = rows_of(generator, first, chain, z_R, own[0])
    expected_D[:12], expected_D[12:15] = rows_OI[:, :4].flatten(), rows_OI[:, 4]
    expected_D[17:23] = rows_of(generator, second, chain, z_R, own[1]).mT.flatten()
    expected_D[15:17] = pinned_of(generator, before, chain, z_R, own[2])[0]
    expected_D[23:] = pinned_of(generator, after, chain, z_R, own[3])[0]
    torch.testing.assert_close(generator(latent_L[None])[0], expected_D, rtol=1e-8, atol=1e-10)


def test_a_case_by_hand():
    """One unit with two inputs, of which the first is pinned, in one mode."""
    generator = SubspaceGenerator(2, [(0, 1, 2, -1, 0, 1)], 1, 1, rank=1, path_rank=1).requires_grad_(False)
    (part,) = generator.parts_in_order()
    generator.step.fill_(0.5)
    part.mean.fill_(4), part.basis.fill_(3), part.frame.copy_(torch.tensor([[2, 0]]))
    part.frame_step.fill_(0.5), part.unit.fill_(2.0)
    part.null.copy_(torch.tensor([[[100, 7]], [[100, 1]]]))
    generator.modes.fill_(2.0)
    draws_SD = generator(torch.zeros(1, generator.latent_size))
    # (4 / 2 + 2 * 3) * 0.5 / 2, and what is left in the other direction: 7 + 2 * 1.
    assert draws_SD.tolist() == [[2.0, 9.0]]
    part.reduction.fill_(0.5)
    part.forget()
    assert generator(torch.zeros(1, generator.latent_size))[0, 0] == 1.75
    part.null_rows.fill_(1.0), part.null_columns.copy_(torch.tensor([5.0, 0.5]))
    latent_L = torch.zeros(generator.latent_size)
    latent_L[-2:] = torch.tensor([3.0, 4.0])
    assert generator(latent_L[None])[0].tolist() == [1.75, 11.0], "noise of the null part reached what is pinned"


def test_what_is_pinned_is_not_reached_by_the_null_part():
    generator = make()
    part = generator.parts_in_order()[0]
    latent_SL = torch.randn(5, generator.latent_size, dtype=torch.float64)
    latent_SL[:, 0] = 0.3
    frame_KI, _ = part.frames(torch.float64)

    def pinned():
        theta_SD = generator(latent_SL)
        return part.matrix.gather(theta_SD[:, :12], theta_SD[:, 12:15]) @ frame_KI.mT

    before = pinned()
    part.null.mul_(5)
    part.null_rows.mul_(3.0)
    part.forget()
    torch.testing.assert_close(pinned(), before)


def test_noise_has_the_scales_that_are_stated():
    generator = make()
    generator.noise_cap.fill_(1e9)
    part = generator.parts_in_order()[2]
    for value in (generator.modes, generator.spread, part.mean):
        value.zero_()
    draws_SD = generator(torch.randn(20_000, generator.latent_size, dtype=torch.float64))[:, part.span]
    expected = part.noise_rows * part.noise_columns / part.unit
    torch.testing.assert_close(draws_SD.std(0), expected, rtol=0.03, atol=0)


def test_a_cap_bounds_noise():
    scale = torch.tensor([0.0, 1e-3, 1.0, 1e3])
    torch.testing.assert_close(capped(scale, torch.tensor(1.0)), torch.tensor([0.0, 1e-3, 0.5**0.5, 1.0]))
    torch.testing.assert_close(capped(scale, torch.tensor(1e6)), scale)


def test_magnitudes_are_reduced_and_zeros_stay():
    values = torch.tensor([[[0.0, 1.0, -3.0]], [[0.0, 1.0, -3.0]]])
    assert reduced(values, torch.tensor([0.25, 0.0])).tolist() == [[[0, 0.75, -2.75]], [[0, 1, -3]]]


def test_latents_are_spread_evenly_over_chains_and_modes():
    generator = make(num_chains=3, num_modes=4)
    latent_SL = generator.latents(60, torch.zeros((), dtype=torch.float64))
    assert latent_SL.dtype == torch.float64
    is_chain_SC, coordinates_SCR = generator.coordinates(latent_SL)
    assert is_chain_SC.sum(0).tolist() == pytest.approx([20] * 3, abs=1)
    assert (is_chain_SC.sum(1) == 1).all()
    assert torch.equal(coordinates_SCR.abs().sum(-1) > 0, is_chain_SC > 0)
    mode_S = (NORMAL.cdf(latent_SL[:, 0]) * 12).long()
    assert mode_S.bincount().tolist() == pytest.approx([5] * 12, abs=1)
    assert (mode_S.diff() < 0).any(), "latents are not in random order"


def test_extreme_quantiles_are_those_of_the_first_and_last_mode():
    generator = make()
    latent_SL = torch.zeros(2, generator.latent_size, dtype=torch.float64)
    latent_SL[:, 0] = torch.tensor([-40.0, 40.0])
    is_chain_SC, coordinates_SCR = generator.coordinates(latent_SL)
    assert is_chain_SC.tolist() == [[1, 0], [0, 1]]
    torch.testing.assert_close(coordinates_SCR.sum(1), generator.modes[[0, 3]])


@pytest.mark.parametrize("numbers_at_once", [1, 30])
def test_blocks_of_rows_make_no_difference(numbers_at_once, monkeypatch):
    generator = make()
    latent_SL = torch.randn(6, generator.latent_size, dtype=torch.float64)
    whole = generator(latent_SL)
    monkeypatch.setattr(weight_matrices, "_NUMBERS_AT_ONCE", numbers_at_once)
    assert torch.equal(whole, generator(latent_SL)) or torch.allclose(whole, generator(latent_SL), rtol=1e-12)
    monkeypatch.setattr("pyro_apd.generators.subspace._KEPT_NUMBERS", 0)
    for part in generator.parts_in_order():
        part.forget()
    torch.testing.assert_close(generator(latent_SL), whole)


def test_no_draw_exceeds_the_bound():
    generator = make()
    latent_SL = 8 * torch.randn(300, generator.latent_size, dtype=torch.float64).sign()
    assert float(generator(latent_SL).abs().max()) <= generator.bound() < 1e9
    for name, value in generator.named_parameters():
        if name.endswith(".reduction"):
            value.fill_(-1e6)  # of a hostile file
    for part in generator.parts_in_order():
        part.forget()
    assert float(generator(latent_SL).abs().max()) <= generator.bound()


def test_state_settings_and_copies_draw_the_same():
    generator = make()
    latent_SL = torch.randn(3, generator.latent_size, dtype=torch.float64)
    expected = generator(latent_SL)
    again = build_generator(json.loads(json.dumps(generator.config))).double()
    again(latent_SL)  # decoded numbers of the zeros that it has now must not be kept
    again.load_state_dict(generator.state_dict())
    again.to("cpu")
    assert again.config == generator.config
    assert torch.equal(again(latent_SL), expected)
    assert torch.equal(pickle.loads(pickle.dumps(generator))(latent_SL), expected)


def test_other_dtypes_round():
    generator = make()
    latent_SL = torch.randn(3, generator.latent_size, dtype=torch.float64)
    latent_SL[:, 0] = 0.2
    expected = generator(latent_SL)
    single = generator.float()(latent_SL.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-3, atol=1e-4)
    assert generator.parts_in_order()[0].basis.dtype == torch.int16


def test_gradients_reach_latents_and_the_law():
    generator = make().requires_grad_(True)
    latent_SL = torch.randn(2, generator.latent_size, dtype=torch.float64)

    def draw(rest):
        return generator(torch.cat([latent_SL[:, :1], rest], 1))

    assert torch.autograd.gradcheck(draw, (latent_SL[:, 1:].requires_grad_(),))
    generator(latent_SL).square().sum().backward()
    for name in ("modes", "spread", "noise_cap", "parts.0.noise_rows", "parts.0.null_columns", "parts.2.noise_columns"):
        assert generator.get_parameter(name).grad.abs().sum() > 0, name


@pytest.mark.parametrize("pinned", [2, 5])
def test_an_offset_is_added_to_the_draws_of_its_chain(pinned):
    plain = make(matrices=[(0, 3, 4, 12, 0, pinned)])
    moved = make(matrices=[(0, 3, 4, 12, 0, pinned, 1)])
    assert moved.config["matrices"] == [[0, 3, 4, 12, 0, pinned, 1]]
    moved.load_state_dict({**moved.state_dict(), **plain.state_dict()})
    part = moved.parts_in_order()[0]
    integers_COI = torch.tensor([2**30, -(2**30), 32768, -32768, 32767, -1, 0, 65535] * 4)[:30].view(2, 3, 5)
    for rows in (slice(0, 2), slice(2, 3)):
        part.set_offset(rows, integers_COI[:, rows].to(torch.int32))
    part.offset_step.data.fill_(2.0**-12)
    part.forget()
    assert part.offset.dtype == torch.int16
    latent_SL = torch.stack([latent_of(moved, mode) for mode in range(4)])
    added_SD = moved(latent_SL) - plain(latent_SL)
    expected_COI = (integers_COI.double() * 2.0**-12).repeat_interleave(2, 0)
    torch.testing.assert_close(
        part.matrix.gather(added_SD[:, :12], added_SD[:, 12:15]), expected_COI, rtol=0, atol=1e-9
    )
    assert not added_SD[:, 15:].any()
    assert moved.bound() >= float(expected_COI.abs().max())
    with pytest.raises(RuntimeError, match="offset"):
        make(matrices=[(0, 3, 4, 12, 0, pinned, 1)]).load_state_dict(plain.state_dict())


@pytest.mark.parametrize("is_transposed", [0, 1])
@pytest.mark.parametrize("has_offset", [0, 1])
@pytest.mark.parametrize("pinned", [2, 5])
def test_scales_multiply_the_columns_of_a_matrix(pinned, has_offset, is_transposed):
    entry = (0, 3, 4, 12, is_transposed, pinned, has_offset)
    plain = make(matrices=[entry])
    scaled = make(matrices=[(*entry, 1)])
    assert scaled.config["matrices"] == [[*entry, 1]]
    scaled.load_state_dict({**scaled.state_dict(), **plain.state_dict()})
    part = scaled.parts_in_order()[0]
    part.exponents.copy_(torch.tensor([0, 3, -10, 1, -2]))
    assert part.exponents.dtype == torch.int16
    latent_SL = torch.stack([latent_of(scaled, mode) for mode in range(4)])
    found_SD, plain_SD = scaled(latent_SL), plain(latent_SL)
    rows_SOI, plain_SOI = (
        part.matrix.gather(drawn_SD[:, :12], drawn_SD[:, 12:15]) for drawn_SD in (found_SD, plain_SD)
    )
    assert torch.equal(rows_SOI, plain_SOI * torch.tensor([1.0, 8.0, 2.0**-10, 2.0, 0.25]))
    assert torch.equal(found_SD[:, 15:], plain_SD[:, 15:])
    if pinned == 2:
        assert scaled.bound() == 8 * plain.bound()


def test_exponents_beyond_all_numbers_leave_no_bound():
    generator = make(matrices=[(0, 3, 4, 12, 0, 2, 0, 1)])
    generator.parts_in_order()[0].exponents.fill_(2**14)
    assert not generator.bound() < float("inf")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"num_chains": 0}, "num_chains"),
        ({"path_rank": -1}, "path_rank"),
        ({"path_rank": 4}, "path_rank is 4, more than rank, which is 3"),
        ({"matrices": [(0, 3, 4, 12, 0)]}, "six integers"),
        ({"matrices": [(0, 3, 4, 12, 0, 2, 1, 1, 1)]}, "six integers, and up to two for its options"),
        ({"matrices": [(0, 3, 4, 12, 0, 2, 0, 2)]}, "scales of a matrix must be 0 or 1; got 2"),
        ({"matrices": [(0, 3, 4, 12, 0, 2, 2)]}, "offset of a matrix must be 0 or 1; got 2"),
        ({"matrices": [(0, 3, 4, 12, 0, 2, -1)]}, "offset of a matrix"),
        ({"matrices": [(0, 3, 4, 12, 0, 0)]}, "K of a matrix"),
        ({"matrices": [(0, 3, 4, 12, 0, 6)]}, "5 columns, and 6 of them are pinned"),
        ({"matrices": [(0, 3, 4, 12, 0, 2), (3, 3, 4, -1, 0, 2)]}, "Matrices overlap"),
        ({"matrices": [(0, 3, 4, 22, 0, 2)]}, "reaches beyond"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)
