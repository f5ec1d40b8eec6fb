# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_apd.kernels.engine.noise import Noise, box_muller


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


@pytest.mark.parametrize("size", [1, 7, 20_001])
def test_raw_and_normal_are_one_stream(size):
    one, other = Noise(torch.zeros(size), [5]), Noise(torch.zeros(size), [5])
    expected = torch.stack([one.normal().clone() for _ in range(12)])
    found = torch.cat([other.to_normal(other.raw(k)).clone() for k in (1, 5, 1, 5)])
    assert torch.equal(found, expected)


def test_a_chain_has_the_same_noise_beside_others():
    alone, beside = Noise(torch.zeros(9), [5]), Noise(torch.zeros(3, 9), [4, 5, 6])
    for _ in range(2000):
        both = beside.normal()
        assert torch.equal(alone.normal(), both[1])
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 20_001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("taken", [0, 1, 5])
def test_state_goes_on_where_it_was(shape, dtype, taken):
    seeds = [1, 2, 3][: shape[0]] if len(shape) > 1 else [1]
    noise, again = Noise(torch.zeros(shape, dtype=dtype), seeds), Noise(torch.zeros(shape, dtype=dtype), seeds)
    for _ in range(taken):
        noise.normal()
    again.load_state_dict(noise.state_dict())
    for _ in range(5):
        assert torch.equal(noise.normal(), again.normal())


def test_raw_like_has_the_form_of_raw():
    for like in (torch.zeros(5), torch.zeros(2, 5), torch.zeros(5, dtype=torch.float64)):
        noise = Noise(like, [1, 2][: like.dim()])
        raw, zeros = noise.raw(3), noise.raw_like(3)
        assert (raw.shape, raw.dtype, raw.stride()) == (zeros.shape, zeros.dtype, zeros.stride())
