# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_apd.generators import precision, rounding, subspace, weight_matrices
from pyro_apd.generators.draw_blocks import DrawBlocks
from pyro_apd.generators.subspace_fit import SubspaceFit, SubspaceSettings
from pyro_apd.generators.weight_matrices import WeightMatrix
from pyro_apd.runtime.dispatch import dispatch_mode

UNITS, INPUTS = 5, 6
MATRIX = WeightMatrix(0, UNITS, INPUTS, UNITS * INPUTS)
SIZE = UNITS * INPUTS + UNITS + 3


def draws(num_chains=1, num_draws=40, dtype=torch.float32, seed=0):
    """Draws with three entries beside a matrix, whose first column varies least."""
    generator = torch.Generator().manual_seed(seed)
    theta_CSD = torch.randn(num_chains, num_draws, SIZE, generator=generator, dtype=torch.float64)
    theta_CSD[..., : UNITS * INPUTS : INPUTS] *= 0.1
    return (theta_CSD + torch.arange(num_chains).reshape(-1, 1, 1)).to(dtype)


def moment(dtype=torch.float64):
    """Inputs of which the first is large."""
    scale_I = torch.tensor([10.0, *[1.0] * (INPUTS - 1), 1.0], dtype=dtype)
    return scale_I.square().diag()


def fitted(theta_CSD, matrix=MATRIX, **settings):
    fit = SubspaceFit(DrawBlocks(theta_CSD), [matrix], [moment()], SubspaceSettings(**settings))
    fit.read()
    return fit.generator()


def latents_of_modes(generator):
    """Latents of every mode, without noise."""
    num = generator.num_chains * generator.num_modes
    latent_SL = torch.zeros(num, generator.latent_size, dtype=generator.step.dtype)
    latent_SL[:, 0] = torch.special.ndtri((torch.arange(num, dtype=torch.float64) + 0.5) / num).to(latent_SL)
    return latent_SL


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_chains", [1, 3])
def test_with_a_mode_for_each_draw_and_fine_steps_the_modes_are_the_draws(num_chains, dtype):
    theta_CSD = draws(num_chains, 20, dtype)
    generator = fitted(theta_CSD, pinned=7, rank=19, segment_length=1, step=1e-4)
    assert generator.parts[0].is_full
    found_SD = generator(latents_of_modes(generator))
    assert found_SD.dtype == dtype
    torch.testing.assert_close(found_SD, theta_CSD.flatten(0, 1), atol=2e-2, rtol=0)


@pytest.mark.parametrize("num_chains", [1, 3])
def test_where_nothing_is_left_out_a_file_keeps_the_modes(num_chains):
    theta_CSD = draws(num_chains, 60)
    generator = fitted(theta_CSD, pinned=7, rank=59, segment_length=1, step=1e-5)
    generator.load_state_dict(precision.decode(precision.encode(generator.state_dict(), "int8"), "int8"))
    found_SD = generator(latents_of_modes(generator))
    # Rounded modes are not quite orthogonal to a constant, so that this is not exact.
    assert (found_SD - theta_CSD.flatten(0, 1)).std() < 2e-3 * theta_CSD.std(1).mean()


def test_a_matrix_with_a_row_per_input_is_fitted_as_its_transpose():
    theta_CSD = draws()
    turned = WeightMatrix(0, UNITS, INPUTS, UNITS * INPUTS, is_transposed=True)
    weights = theta_CSD[..., : UNITS * INPUTS].unflatten(-1, (UNITS, INPUTS)).mT.flatten(-2)
    theirs = fitted(torch.cat([weights, theta_CSD[..., UNITS * INPUTS :]], -1), turned)
    ours = fitted(theta_CSD)
    one_SD, other_SD = (g(latents_of_modes(g)) for g in (ours, theirs))
    back = other_SD[..., : UNITS * INPUTS].unflatten(-1, (INPUTS, UNITS)).mT.flatten(-2)
    torch.testing.assert_close(back, one_SD[..., : UNITS * INPUTS], atol=1e-4, rtol=0)


def test_moments_of_independent_weights_are_kept():
    theta_CSD = draws(num_draws=400)
    generator = fitted(theta_CSD, pinned=2, rank=20, path_rank=2)
    torch.manual_seed(0)
    with torch.no_grad():
        found_SD = generator(generator.latents(4000, generator.step))
    mean_D, sd_D = theta_CSD[0].mean(0), theta_CSD[0].std(0)
    assert (found_SD.mean(0) - mean_D).abs().max() < 0.15 * sd_D.max()
    ratio_D = found_SD.std(0) / sd_D
    assert ratio_D.min() > 0.75
    assert ratio_D.max() < 1.3
    assert abs(float(ratio_D.mean()) - 1) < 0.06


def test_the_null_part_does_not_reach_what_is_pinned():
    generator = fitted(draws(), pinned=2, rank=8, path_rank=3)
    part = generator.parts[0]
    latent_SL = latents_of_modes(generator)
    start = 1 + generator.rank + UNITS * 2
    noisy_SL = latent_SL.clone()
    noisy_SL[:, start : start + UNITS * (INPUTS + 1)] = 3.0
    frame_KI, _ = part.frames(torch.float32)
    pinned = [MATRIX.gather(t[:, : UNITS * INPUTS], t[:, UNITS * INPUTS : -3]) @ frame_KI.mT for t in
              (generator(latent_SL), generator(noisy_SL))]  # fmt: skip
    assert (generator(noisy_SL) - generator(latent_SL)).abs().max() > 0.5
    torch.testing.assert_close(*pinned, atol=1e-4, rtol=0)


def test_large_inputs_are_pinned_first():
    generator = fitted(draws(), pinned=1, rank=8)
    frame_KI, _ = generator.parts[0].frames(torch.float32)
    assert frame_KI.abs().argmax() == 0


def test_coarser_steps_leave_smaller_integers_and_more_noise():
    fit = SubspaceFit(DrawBlocks(draws()), [MATRIX], [moment()], SubspaceSettings(rank=8))
    fit.read()
    fine = [(p.basis.abs().float().mean(), p.noise_columns.mean()) for p in fit.generator(1e-3, 0.1).parts]
    coarse = [(p.basis.abs().float().mean(), p.noise_columns.mean()) for p in fit.generator(3e-2, 0.8).parts]
    for (fine_size, fine_noise), (coarse_size, coarse_noise) in zip(fine, coarse, strict=True):
        assert coarse_size < 0.1 * fine_size
        assert coarse_noise >= fine_noise


def test_a_fit_repeats_itself():
    one, other = fitted(draws()), fitted(draws())
    for (name, value), again in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, again), name


def test_constant_entries_stay_constant():
    theta_CSD = draws()
    theta_CSD[..., -1] = 2.5
    generator = fitted(theta_CSD, rank=8)
    torch.manual_seed(0)
    with torch.no_grad():
        found_SD = generator(generator.latents(50, generator.step))
    assert (found_SD[:, -1] - 2.5).abs().max() < 1e-3
    assert bool(found_SD.isfinite().all())


def test_coordinates_follow_functions_too():
    theta_CSD = draws(num_draws=60)
    of_draws_CTF = torch.randn(1, 60, 2, generator=torch.Generator().manual_seed(5))

    def explained(functions_CTF):
        fit = SubspaceFit(DrawBlocks(theta_CSD), [MATRIX], [moment()], SubspaceSettings(rank=3), functions_CTF)
        fit.read()
        coordinates_TR = fit._coordinates_CTR[0] / 60**0.5
        centred_TF = of_draws_CTF[0] - of_draws_CTF[0].mean(0)
        return float((coordinates_TR.mT @ centred_TF).square().sum() / centred_TF.square().sum())

    assert explained(None) < 0.3
    assert explained(of_draws_CTF) > 0.8


def test_what_is_smaller_than_a_step_is_kept_on_average():
    theta_CSD = draws(num_draws=40, dtype=torch.float64)
    settings = {"rank": 5, "segment_length": 1, "step": 10.0, "null_step": 10.0}

    def first_basis(**more):
        torch.manual_seed(0)
        generators = [fitted(theta_CSD, **settings, **more).parts[0] for _ in range(300)]
        return torch.stack([part.basis[0].double() for part in generators])

    exact_OK = fitted(theta_CSD, rank=5, segment_length=1, step=1e-4).parts[0]
    assert not first_basis().any()
    found_OK = first_basis(is_dithered=True)
    assert set(found_OK.unique().tolist()) <= {-1.0, 0.0, 1.0}
    wanted_OK = exact_OK.basis[0].double() * 1e-4 / 10.0
    torch.testing.assert_close(found_OK.mean(0), wanted_OK, atol=0.06, rtol=0)


def test_null_parts_without_noise_are_means_and_paths():
    theta_CSD = draws(num_draws=40)
    options = {"pinned": 2, "rank": 5, "path_rank": 5, "segment_length": 1}
    with_noise, without = (fitted(theta_CSD, has_null_noise=flag, **options) for flag in (True, False))
    assert with_noise.parts[0].null_rows.all()
    assert not without.parts[0].null_rows.any()
    latent_SL = latents_of_modes(without)
    torch.testing.assert_close(without(latent_SL), with_noise(latent_SL))  # whose noise is zero


def test_null_parts_stay_right_however_fine_their_step():
    theta_CSD = draws(num_draws=40, dtype=torch.float64)
    theta_CSD[..., : UNITS * INPUTS] *= 1 + 9 * (torch.arange(UNITS * INPUTS) % 7 == 0)  # far from the mean square
    options = {"pinned": 2, "rank": 30, "path_rank": 30, "segment_length": 1, "step": 1e-3}
    coarse, fine = (fitted(theta_CSD, **options, null_step=null_step) for null_step in (2.0**-6, 0.001))
    theirs_SD, ours_SD = (generator(latents_of_modes(generator)) for generator in (coarse, fine))
    torch.testing.assert_close(ours_SD, theirs_SD, atol=1e-6, rtol=0)


@pytest.mark.parametrize("null_step", [0.2, 0.35])
def test_paths_are_rounded_as_if_once(null_step):
    """They are rounded to fine integers first, which must not be seen in the coarse ones."""
    theta_CSD = draws(num_draws=40, dtype=torch.float64)
    options = {"pinned": 2, "rank": 12, "path_rank": 12, "segment_length": 1}

    def share_of_zeros(null_step):
        return (fitted(theta_CSD, **options, null_step=null_step).parts[0].null == 0).double().mean()

    a_little_more = share_of_zeros(1.001 * null_step) - share_of_zeros(0.999 * null_step)
    assert 0 <= a_little_more < 0.01


def means_of_chains(model):
    """Means of the generator's chains, whose modes are their middle."""
    latent_SL = latents_of_modes(model)
    return model(latent_SL).detach().double().unflatten(0, (model.num_chains, -1)).mean(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pinned", [2, 7])
@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e3, 1e4, 1e5, 1e6])
def test_narrow_posteriors_keep_their_means(ratio, pinned, dtype):
    """As where a chain begins at a trained network: weights are many times as large as their deviations."""
    generator = torch.Generator().manual_seed(3)
    mean_CD = torch.randn(2, SIZE, generator=generator, dtype=torch.float64)
    noise_CSD = torch.randn(2, 60, SIZE, generator=generator, dtype=torch.float64)
    theta_CSD = (mean_CD.unsqueeze(1) + noise_CSD / ratio).to(dtype)
    model = fitted(theta_CSD, pinned=pinned, rank=10, null_step=0.1)
    assert model.parts[0].has_offset == (ratio > 1)
    error_CD = (means_of_chains(model) - theta_CSD.double().mean(1)).abs() * ratio
    resolution = 3 * torch.finfo(dtype).eps * float(mean_CD.abs().max()) * ratio
    assert float(error_CD.max()) < (0.02 if ratio > 1 else 0.05) + resolution


def test_one_matrix_that_hardly_moves_leaves_the_others_fine():
    second = WeightMatrix(SIZE, UNITS, INPUTS, SIZE + UNITS * INPUTS)

    def fit_beside(first_CSD):
        both_CSD = torch.cat([first_CSD, draws(seed=1)], -1)
        fit = SubspaceFit(DrawBlocks(both_CSD), [MATRIX, second], [moment(), moment()], SubspaceSettings(rank=8))
        fit.read()
        model = fit.generator()
        error_D = (means_of_chains(model) - both_CSD.double().mean(1)).abs()[0]
        assert float(error_D[: UNITS * INPUTS].max()) < 1e-6 * float(first_CSD.abs().max())
        assert float(error_D[SIZE : SIZE + UNITS * INPUTS].max()) < 0.02
        return model.requires_grad_(False)

    mean_D = draws(seed=2)[0, 0]
    for constant in (1e-3, 1.0, 1e4):
        model = fit_beside((constant * mean_D).expand(1, 40, -1))
        assert float(model.step) == pytest.approx(SubspaceSettings().step, rel=0.01)
        assert [part.has_offset for part in model.parts[:2]] == [True, False]
        torch.manual_seed(0)
        found_SD = model(model.latents(20, model.step)).detach()[:, : UNITS * INPUTS]
        assert float(found_SD.std(0).max()) <= 1e-6 * constant


def test_numbers_without_a_matrix_keep_their_means_however_fine_the_steps():
    theta_CSD = draws().double() * 1e-5 + 1.0
    fit = SubspaceFit(DrawBlocks(theta_CSD), [], [], SubspaceSettings(rank=8))
    fit.read()
    for step in (1e-3, 1e-6, 1e-9):
        model = fit.generator(step)
        error_CD = means_of_chains(model) - theta_CSD.double().mean(1)
        assert float(error_CD.abs().max()) < 5e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [0.0, 10.0, 1000.0])
def test_outputs_are_right_where_inputs_have_a_large_mean(mean, dtype):
    """As of a table that was not standardised: outputs depend on one direction far more than on the others."""
    generator = torch.Generator().manual_seed(4)
    inputs_NI = torch.randn(200, 24, generator=generator, dtype=torch.float64)
    inputs_NI += mean * (1 + torch.rand(24, generator=generator, dtype=torch.float64))
    moment_II = inputs_NI.mT @ inputs_NI
    root_II = torch.linalg.cholesky(torch.linalg.inv(moment_II + torch.eye(24)))
    theta_SOI = torch.randn(60, UNITS, 24, generator=generator, dtype=torch.float64) @ root_II.mT
    draws_CSD = theta_SOI.flatten(1).unsqueeze(0).to(dtype)
    fit = SubspaceFit(DrawBlocks(draws_CSD), [WeightMatrix(0, UNITS, 24)], [moment_II / 200], SubspaceSettings(rank=10))
    fit.read()
    model = fit.generator()
    torch.manual_seed(0)
    with torch.no_grad():
        found_SOI = model(model.latents(500, model.step)).double().unflatten(1, (UNITS, 24))
    outputs_SON, wanted_SON = found_SOI @ inputs_NI.mT, theta_SOI @ inputs_NI.mT
    variance = wanted_SON.var(0).sum()
    assert float(outputs_SON.var(0).sum() / variance) == pytest.approx(1, abs=0.2)
    assert float((outputs_SON.mean(0) - wanted_SON.mean(0)).square().sum() / variance) < 0.02


@pytest.mark.parametrize("constant", [0.0, 0.25])
def test_a_matrix_that_never_moves_stays_what_it_is(constant):
    theta_CSD = draws()
    theta_CSD[..., : UNITS * INPUTS + UNITS] = constant
    model = fitted(theta_CSD)
    found_SD = model(model.latents(50, model.step))
    torch.testing.assert_close(
        found_SD[:, : UNITS * INPUTS + UNITS],
        theta_CSD[0, :1, : UNITS * INPUTS + UNITS].expand(50, -1),
        atol=2e-3,
        rtol=0,
    )
    assert bool((found_SD[:, -3:].std(0) > 0.5).all())


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1.0])
def test_weights_of_inputs_that_are_all_zero_keep_their_spread(scale):
    """In memory and in a file: they tell how far predictions differ where inputs are not zero."""
    theta_CSD = draws(num_draws=100)
    square_I = torch.full((INPUTS + 1,), scale, dtype=torch.float64)
    square_I[:3] = 0
    fit = SubspaceFit(DrawBlocks(theta_CSD), [MATRIX], [square_I.diag()], SubspaceSettings(rank=10))
    fit.read()
    model = fit.generator()
    for dtype in ("float32", "int8"):
        model.load_state_dict(precision.decode(precision.encode(model.state_dict(), dtype), dtype))
        torch.manual_seed(0)
        found_SD = model(model.latents(500, model.step)).detach()
        ratio_D = found_SD.std(0) / theta_CSD[0].std(0)
        assert float(ratio_D.log().abs().max()) < 0.7, dtype


UNITS_WIDE, INPUTS_WIDE = 200, 30


def wide_fit(mean=0.0, dtype=torch.float32):
    """A matrix with a null part whose paths are far more numbers than anything else."""
    generator = torch.Generator().manual_seed(3)
    theta_CSD = mean + torch.randn(1, 40, UNITS_WIDE * INPUTS_WIDE, generator=generator, dtype=dtype)
    matrix = WeightMatrix(0, UNITS_WIDE, INPUTS_WIDE)
    settings = SubspaceSettings(pinned=10, rank=10)
    fit = SubspaceFit(DrawBlocks(theta_CSD), [matrix], [torch.eye(INPUTS_WIDE).double()], settings)
    fit.read()
    return fit


def largest_float_of(function):
    """The largest number of entries of a floating-point tensor that an operation returns."""
    largest = 0

    class Recorder(dispatch_mode()):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.is_floating_point():
                largest = max(largest, found.numel())
            return found

    with Recorder():
        function()
    return largest


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_bases_and_paths_are_never_all_in_floating_point_while_they_are_rounded(monkeypatch, mean):
    fit = wide_fit(mean)
    monkeypatch.setattr(rounding, "_NUMBERS_AT_ONCE", 4096)
    assert largest_float_of(fit.generator) <= UNITS_WIDE * INPUTS_WIDE


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_rounding_by_blocks_gives_what_rounding_at_once_gives(monkeypatch, mean):
    generator = wide_fit(mean).generator()
    assert generator.parts[0].has_offset == (mean > 0)
    expected = generator.state_dict()
    monkeypatch.setattr(rounding, "_NUMBERS_AT_ONCE", 500)
    for is_last in (False, True):
        found = wide_fit(mean).generator(is_last=is_last).state_dict()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_rounding_again_gives_the_same(mean, dtype):
    """Nothing that the passes found is changed where it is rounded."""
    fit = wide_fit(mean, dtype)
    first = {name: value.clone() for name, value in fit.generator().state_dict().items()}
    fit.generator(step=0.01, null_step=0.8)
    for name, value in fit.generator().state_dict().items():
        assert torch.equal(value, first[name]), name


def test_the_last_rounding_takes_no_second_tensor_for_null_parts():
    fit = wide_fit()
    fine = fit._parts[0].null
    assert fit.generator(is_last=True).parts[0].null is fine
    fit = wide_fit()
    first = fit.generator().parts[0].null.clone()
    coarse = fit.generator(null_step=0.8).parts[0].null.clone()
    assert not torch.equal(first, coarse)
    assert torch.equal(fit.generator().parts[0].null, first)


def test_large_integers_are_decoded_for_a_draw_by_blocks_of_rows(monkeypatch):
    generator = wide_fit().generator()
    latent_SL = torch.randn(1, generator.latent_size, generator=torch.Generator().manual_seed(0))
    expected_SD = generator(latent_SL)
    monkeypatch.setattr(subspace, "_KEPT_NUMBERS", 0)
    monkeypatch.setattr(weight_matrices, "_NUMBERS_AT_ONCE", 4096)
    with torch.no_grad():
        assert largest_float_of(lambda: generator(latent_SL)) <= generator.latent_size
        torch.testing.assert_close(generator(latent_SL), expected_SD)


WIDE = WeightMatrix(0, 12, 40, 12 * 40)
NARROW = slice(3, 40, 8)


def fitted_to_columns(deviation_I, input_scale_I, pinned=16, mean=0.0, correlation=0.0):
    """A fit to independent weights whose columns have these deviations, and its draws ``(S, O, I)``."""
    generator = torch.Generator().manual_seed(5)
    inputs_NI = torch.randn(400, 41, generator=generator, dtype=torch.float64)
    mixed_NI = inputs_NI @ torch.randn(41, 41, generator=generator, dtype=torch.float64) * torch.linspace(2, 0.1, 41)
    inputs_NI = (torch.lerp(inputs_NI, mixed_NI, correlation)) * input_scale_I
    noise_SOI = torch.randn(300, 12, 41, generator=generator, dtype=torch.float64)
    rows_SOI = (noise_SOI + mean * torch.randn(12, 41, generator=generator, dtype=torch.float64)) * deviation_I
    theta_SD = torch.cat([rows_SOI[..., :-1].flatten(1), rows_SOI[..., -1]], 1).float()
    moments = [inputs_NI.mT @ inputs_NI / 400]
    fit = SubspaceFit(DrawBlocks(theta_SD[None]), [WIDE], moments, SubspaceSettings(pinned=pinned))
    fit.read()
    model = fit.generator(is_last=True).requires_grad_(False)
    torch.manual_seed(0)
    found_SD = model(model.latents(1500, model.step))
    return model.parts[0], rows_SOI, WIDE.gather(found_SD[:, : 12 * 40], found_SD[:, 12 * 40 :]).double()


@pytest.mark.parametrize("pinned", [16, 41])
@pytest.mark.parametrize("correlation", [0.0, 0.5])
@pytest.mark.parametrize("inputs", ["none", "alike", "large"])
@pytest.mark.parametrize("narrow", [0.1, 1e-3, 1e-5])
def test_columns_that_vary_far_less_are_not_too_wide(narrow, inputs, correlation, pinned):
    """Whether functions depend on them or not. Without scales they were up to 750 times too wide."""
    deviation_I = torch.ones(41, dtype=torch.float64)
    deviation_I[NARROW] = narrow
    input_scale_I = torch.ones(41, dtype=torch.float64)
    input_scale_I[NARROW] = {"none": 0.0, "alike": 1.0, "large": 1 / narrow}[inputs]
    part, rows_SOI, found_SOI = fitted_to_columns(deviation_I, input_scale_I, pinned, 3.0, correlation)
    assert part.has_scales
    ratio_I = (found_SOI.var(0).mean(0) / rows_SOI.var(0).mean(0)).sqrt()
    assert float(ratio_I.min()) > 0.75
    assert float(ratio_I.max()) < 1.4
    if not part.is_full:  # else means are as coarse as functions allow, which do not depend on some of them
        error_OI = (found_SOI.mean(0) - rows_SOI.mean(0)) / deviation_I
        assert float(error_OI.square().mean(0).sqrt().max()) < 0.2


def test_a_column_that_never_moves_does_not():
    deviation_I = torch.ones(41, dtype=torch.float64)
    deviation_I[7] = 0.0
    part, _, found_SOI = fitted_to_columns(deviation_I, torch.ones(41, dtype=torch.float64))
    assert part.has_scales
    assert float(found_SOI[..., 7].std(0).max()) < 1e-6


def test_columns_that_vary_alike_have_no_scales():
    part, _, _ = fitted_to_columns(torch.linspace(0.3, 1.0, 41, dtype=torch.float64), torch.ones(41))
    assert not part.has_scales
    assert not hasattr(part, "exponents")
