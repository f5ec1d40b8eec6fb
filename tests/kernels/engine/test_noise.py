# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_apd.kernels.engine.noise import Noise, box_muller, checked_noise, three_point

KINDS = pytest.mark.parametrize("kind", ["normal", "three-point"])


def kolmogorov_distance(values):
    """Largest distance between the empirical distribution function and the normal one."""
    ordered = values.double().flatten().sort().values
    exact = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return float((exact - steps).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_standard_normal(dtype):
    noise = Noise(torch.zeros(1000, dtype=dtype), [3])
    draws = torch.stack([noise.normal().clone() for _ in range(200)])
    assert draws.dtype == dtype
    assert kolmogorov_distance(draws) < 1.63 / math.sqrt(draws.numel())  # 1 % critical value
    correlation = torch.corrcoef(draws[:, :50].T) - torch.eye(50, dtype=dtype)
    assert correlation.abs().max() < 5 / math.sqrt(200)


def test_box_muller_by_hand():
    bits = torch.tensor([0, 2**24 - 1, -1, 2**23, 0, 2**22], dtype=torch.int32)  # three radii, then three angles
    first = [math.sqrt(-2 * math.log(u)) for u in (2**-24, 1.0, 1.0)]
    angle = [math.pi, 0.0, math.pi / 2]
    expected = [r * math.cos(a) for r, a in zip(first, angle, strict=True)]
    expected += [r * math.sin(a) for r, a in zip(first, angle, strict=True)]
    torch.testing.assert_close(box_muller(bits), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_extreme_bits_stay_finite():
    bits = torch.tensor([0, -1, 2**31 - 1, -(2**31)] * 2, dtype=torch.int32)
    assert bool(box_muller(bits).isfinite().all())


@KINDS
@pytest.mark.parametrize("size", [1, 7, 20_001])
def test_raw_and_normal_are_one_stream(size, kind):
    one, other = Noise(torch.zeros(size), [5], kind=kind), Noise(torch.zeros(size), [5], kind=kind)
    expected = torch.stack([one.normal().clone() for _ in range(12)])
    found = torch.cat([other.to_normal(other.raw(k)).clone() for k in (1, 5, 1, 5)])
    assert torch.equal(found, expected)


@KINDS
def test_a_chain_has_the_same_noise_beside_others(kind):
    alone, beside = Noise(torch.zeros(9), [5], kind=kind), Noise(torch.zeros(3, 9), [4, 5, 6], kind=kind)
    for _ in range(2000):
        both = beside.normal()
        assert torch.equal(alone.normal(), both[1])
    assert not torch.equal(both[0], both[1])


@KINDS
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 20_001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("taken", [0, 1, 5])
def test_state_goes_on_where_it_was(shape, dtype, taken, kind):
    seeds = [1, 2, 3][: shape[0]] if len(shape) > 1 else [1]
    noise, again = (Noise(torch.zeros(shape, dtype=dtype), seeds, kind=kind) for _ in range(2))
    for _ in range(taken):
        noise.normal()
    again.load_state_dict(noise.state_dict())
    for _ in range(5):
        assert torch.equal(noise.normal(), again.normal())


@KINDS
def test_raw_like_has_the_form_of_raw(kind):
    for like in (torch.zeros(5), torch.zeros(2, 5), torch.zeros(5, dtype=torch.float64)):
        noise = Noise(like, [1, 2][: like.dim()], kind=kind)
        raw, zeros = noise.raw(3), noise.raw_like(3)
        assert (raw.shape, raw.dtype, raw.stride()) == (zeros.shape, zeros.dtype, zeros.stride())


def test_three_points_have_the_moments_of_a_normal():
    every_byte = torch.arange(256, dtype=torch.uint8)
    points = three_point(every_byte, torch.float64)
    assert len(points.unique()) == 3
    moments = [float((points**order).mean()) for order in range(1, 6)]
    torch.testing.assert_close(moments, [0.0, 1.0, 0.0, 128 / 43, 0.0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_three_point_noise_is_uncorrelated(dtype):
    noise = Noise(torch.zeros(1000, dtype=dtype), [3], kind="three-point")
    draws = torch.stack([noise.normal().clone() for _ in range(400)])
    assert draws.dtype == dtype
    assert draws.abs().unique().numel() == 2
    assert abs(float(draws.var()) - 1) < 5 * (1.977 / draws.numel()) ** 0.5  # whose fourth moment is 2.977
    correlation = torch.corrcoef(draws[:, :50].T) - torch.eye(50, dtype=dtype)
    assert correlation.abs().max() < 5 / math.sqrt(400)


@pytest.mark.parametrize(("kind", "thinning"), [("normal", 1), ("three-point", 20)])
def test_noise_of_a_kind_that_is_accepted(kind, thinning):
    assert checked_noise(kind, thinning) == kind


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("two-point", "noise='two-point' must be 'normal' or 'three-point'"),
        (["normal"], r"noise=\['normal'\] must be"),
        ("three-point", "thinning of at least 20, got thinning=19.*Set a larger thinning"),
    ],
)
def test_noise_that_is_not_accepted(kind, message):
    with pytest.raises(ValueError, match=message):
        checked_noise(kind, 19)
