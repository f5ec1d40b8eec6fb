# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Rounding to few bits: what is exact, what is smaller than without error feedback, and the count of bytes."""

import pytest
import torch

from pyro_apd.baselines.error_feedback import (
    STEPS,
    DrawRounding,
    rounded_to_int8,
    rounded_to_nearest,
    rounded_with_feedback,
)
from pyro_apd.distillation.layer_inputs import LayerInputs
from pyro_apd.generators.weight_matrices import WeightMatrix
from pyro_apd.models.layout import Layout

BITS = sorted(STEPS)


def moment_of(num_inputs, rank):
    inputs_NI = torch.randn(200, rank, dtype=torch.float64) @ torch.randn(rank, num_inputs, dtype=torch.float64)
    return inputs_NI.mT @ inputs_NI / 200


def output_error(values_RI, rounded_RI, moment_II):
    """Mean square error of the layer's outputs."""
    error_RI = (values_RI - rounded_RI).double()
    return float(((error_RI @ moment_II) * error_RI).sum(1).mean())


@pytest.mark.parametrize("bits", BITS)
def test_uncorrelated_inputs_are_rounded_to_nearest(bits):
    values_RI = torch.randn(7, 130)
    rounded_RI = rounded_with_feedback(values_RI, torch.rand(130).diag(), bits)
    assert rounded_RI.equal(rounded_to_nearest(values_RI, bits))


@pytest.mark.parametrize("bits", BITS)
def test_entries_are_levels_of_their_row(bits):
    values_RI = torch.randn(5, 300) * torch.logspace(-3, 3, 5).unsqueeze(1)
    for rounded_RI in (rounded_to_nearest(values_RI, bits), rounded_with_feedback(values_RI, moment_of(300, 20), bits)):
        assert all(2 ** (bits - 1) < len(row.unique()) <= 2**bits for row in rounded_RI)


def test_the_next_column_corrects_the_error():
    """With moments a, b, b, c of two inputs, the best correction is the error times b / c."""
    values_R2, moment_22 = torch.randn(6, 2), torch.tensor([[2.0, 0.9], [0.9, 0.5]])
    rounded_R2 = rounded_with_feedback(values_R2, moment_22, 3, num_kept=1)
    assert rounded_R2[:, :1].equal(rounded_to_nearest(values_R2[:, :1], 3))
    error_R = values_R2[:, 0] - rounded_R2[:, 0]
    ratio = 0.9 / (0.5 + 0.02 * 1.25)
    torch.testing.assert_close(rounded_R2[:, 1], values_R2[:, 1] + ratio * error_R)


@pytest.mark.parametrize("bits", BITS)
def test_outputs_change_less_than_by_rounding_to_nearest(bits):
    values_RI, moment_II = torch.randn(20, 150), moment_of(150, 15)
    nearest = output_error(values_RI, rounded_to_nearest(values_RI, bits), moment_II)
    feedback = output_error(values_RI, rounded_with_feedback(values_RI, moment_II, bits), moment_II)
    assert feedback < 0.35 * nearest


def test_rows_do_not_depend_on_each_other():
    values_RI, moment_II = torch.randn(9, 70), moment_of(70, 8)
    whole = rounded_with_feedback(values_RI, moment_II, 2, num_kept=1)
    torch.testing.assert_close(whole[4:5], rounded_with_feedback(values_RI[4:5], moment_II, 2, num_kept=1))


def test_inputs_that_are_always_zero_are_no_error():
    assert rounded_with_feedback(torch.randn(3, 4), torch.zeros(4, 4), 4).isfinite().all()


def test_int8_keeps_integers_and_zeros():
    values_RI = torch.randint(-126, 127, (4, 40)).float()
    values_RI[:, 0] = 127
    values_RI *= torch.tensor([1.0, 2.0**-60, 2.0**40, 0.0]).unsqueeze(1)
    assert rounded_to_int8(values_RI).equal(values_RI)


def test_int8_errs_by_half_a_step_at_most():
    values_RI = torch.randn(50, 64)
    step_R1 = values_RI.abs().amax(1, keepdim=True) / 127
    assert bool(((rounded_to_int8(values_RI) - values_RI).abs() <= 0.75 * step_R1).all())


LAYOUT = Layout({"a.weight": (6, 20), "a.bias": (6,), "b.weight": (3, 6), "b.bias": (3,), "scale": ()})


def rounding(bits=3, transposed=False):
    matrix = WeightMatrix(0, 6, 20, 120, transposed)
    return DrawRounding(LAYOUT, bits, [LayerInputs(matrix, moment_of(21, 5))])


def test_bytes_are_those_of_integers_and_scales():
    # The bias: 6 and a scale; the last matrix, in rows of fewer than 16: 18 and a scale; its bias: 3 and a scale.
    others = 6 + 2 + 18 + 2 + 3 + 2 + 4
    assert DrawRounding(LAYOUT).num_bytes(5) == 5 * (120 + 12 + others)
    assert rounding(3).num_bytes(5) == 132 + 5 * (12 + others) + 225
    assert rounding(2).num_bytes(1, num_means=4) == 4 * 132 + 12 + others + 1 + 30


@pytest.mark.parametrize("num_means", [1, 3])
def test_the_budget_is_used_up_to_the_last_draw(num_means):
    few = rounding(3)
    for budget in [0, 131, 400, *range(1000, 1100, 7)]:
        count = few.most_draws(budget, num_means)
        assert count == 0 or few.num_bytes(count, num_means) <= budget
        assert few.num_bytes(count + 1, num_means) > budget


def test_means_per_chain_pay_where_chains_are_apart():
    theta_CTD = torch.randn(3, 40, LAYOUT.size)
    shift_C11 = torch.tensor([-3.0, 0.0, 3.0]).reshape(3, 1, 1)
    few = rounding()
    assert not few.pays_for_means(theta_CTD, 30)
    assert few.pays_for_means(theta_CTD + shift_C11, 30)
    assert not few.pays_for_means(theta_CTD + shift_C11, 5)
    assert not few.pays_for_means(theta_CTD[:1], 30)


def test_the_bias_corrects_what_rounding_shifts():
    """On inputs with a large mean, the mean output is kept better than each weight is."""
    x_NI = torch.cat([3 + 0.1 * torch.randn(100, 20), torch.ones(100, 1)], 1)
    one = LayerInputs(WeightMatrix(0, 6, 20, 120), (x_NI.mT @ x_NI / 100).double())
    theta_KD = torch.randn(8, LAYOUT.size)
    mean_1D, mean_K = theta_KD.mean(0, keepdim=True), torch.zeros(8, dtype=torch.long)
    found = LAYOUT.split(DrawRounding(LAYOUT, 2, [one]).rounded(theta_KD, mean_1D, mean_K) - theta_KD)
    shift_KO = found["a.weight"] @ x_NI[:, :20].mean(0) + found["a.bias"]
    assert shift_KO.abs().mean() < 0.1 * found["a.weight"].abs().mean() * 3 * 20
    assert found["b.weight"].abs().max() < 0.04
    assert not found["scale"].any()


def test_transposed_weights_are_the_same_weights():
    theta_KD, mean_K = torch.randn(4, LAYOUT.size), torch.zeros(4, dtype=torch.long)

    def transposed(theta_KD):
        weights_KW = theta_KD[:, :120].unflatten(1, (6, 20)).mT.flatten(1)
        return torch.cat([weights_KW, theta_KD[:, 120:]], 1)

    plain, other = rounding(), rounding(transposed=True)
    other.inputs[0].moment_II = plain.inputs[0].moment_II
    mean_1D = theta_KD.mean(0, keepdim=True)
    expected_KD = plain.rounded(theta_KD, mean_1D, mean_K)
    found_KD = transposed(theta_KD)
    found_KD = other.rounded(found_KD, transposed(mean_1D), mean_K)
    torch.testing.assert_close(found_KD, transposed(expected_KD))


def test_draws_are_near_their_own_mean():
    """Chains far apart are rounded as finely as one chain, each around its mean."""
    theta_KD, mean_K = torch.randn(6, LAYOUT.size), torch.tensor([0, 1] * 3)
    far_2D = torch.tensor([[0.0], [100.0]]).expand(2, LAYOUT.size)
    found_KD = rounding(4).rounded(theta_KD + far_2D[mean_K], far_2D, mean_K)
    error_K = (found_KD - theta_KD - far_2D[mean_K])[:, :120].abs().mean(1)
    assert error_K.max() < 0.4
