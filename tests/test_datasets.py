# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The digits as the paper scales its images, and inputs out of distribution."""

import sys

import pytest
import torch
from sklearn.datasets import load_digits

from pyro_apd.datasets import digits, inverted, noise


@pytest.fixture(scope="module", name="data")
def _data():
    return digits()


def rows(*parts):
    return sorted(tuple(row) for part in parts for row in part.tolist())


def test_digits_are_all_there_once(data):
    images, labels = load_digits(return_X_y=True)
    expected = torch.cat([torch.tensor(images, dtype=torch.float32) / 8 - 1, torch.tensor(labels).unsqueeze(-1)], -1)
    ours = [torch.cat([x, y.unsqueeze(-1)], -1) for x, y in [(data.x_train, data.y_train), (data.x_test, data.y_test)]]
    assert rows(*ours) == rows(expected)
    assert len(data.x_test) == len(data.y_test) == 359
    for x, y in [(data.x_train, data.y_train), (data.x_test, data.y_test)]:
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert (x.min(), x.max()) == (-1, 1)


@pytest.mark.parametrize("test_size", [0.1, 0.5, 100])
def test_split_keeps_the_shares_of_the_classes(test_size):
    data = digits(test_size=test_size)
    assert len(data.x_test) == (test_size if test_size == 100 else round(1797 * test_size))
    shares = [torch.bincount(y, minlength=10) / len(y) for y in (data.y_train, data.y_test)]
    assert (shares[0] - shares[1]).abs().max() < 0.01


def test_the_seed_decides_the_split(data):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(digits(seed=0).x_test, data.x_test)
    assert not torch.equal(digits(seed=1).x_test, data.x_test)
    assert torch.equal(torch.get_rng_state(), state)


def test_to(data):
    moved = data.to("meta")
    assert {moved.x_train.device.type, moved.y_train.device.type, moved.x_test.device.type} == {"meta"}


@pytest.mark.parametrize("test_size", [0, 1797, 0.0, 1.0, -0.2, 9, 1.5])
def test_bad_test_size(test_size):
    with pytest.raises(ValueError, match=rf"`test_size` must leave at least 10 of 1797 images.*got {test_size}"):
        digits(test_size=test_size)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-apd\[demo\]'"):
        digits()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise(dtype):
    like = torch.linspace(-3, 5, 6000, dtype=dtype).reshape(100, 60)
    state = torch.get_rng_state()
    value = noise(like, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert (value.shape, value.dtype) == (like.shape, dtype)
    assert -3 <= value.min() < -2.95
    assert 4.95 < value.max() <= 5
    assert abs(value.mean() - 1) < 0.1
    assert len(value.unique()) > 5900
    assert torch.equal(noise(like, seed=1), value)
    assert not torch.equal(noise(like, seed=2), value)


@pytest.mark.parametrize("like", [torch.empty(0, 3), torch.ones(3, dtype=torch.long)])
def test_noise_like_nothing(like):
    with pytest.raises(ValueError, match="`like` must hold inputs of a floating dtype"):
        noise(like)


def test_inverted(data):
    assert torch.equal(inverted(data.x_test), -data.x_test)
    assert torch.equal(inverted(inverted(data.x_test)), data.x_test)


@pytest.mark.parametrize("x", [torch.tensor([0.0, 16.0]), torch.tensor([torch.nan])])
def test_inverted_out_of_range(x):
    with pytest.raises(ValueError, match=r"values in \[-1, 1\]"):
        inverted(x)
