# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The digits as the paper scales its images, and inputs out of distribution."""

import gzip
import hashlib
import io
import os
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from pyro_apd import datasets
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


# -- files ------------------------------------------------------------------------------------------------------------


def put(folder, monkeypatch, name, contents):
    """Writes a file, and makes it the one that is meant."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(contents)
    monkeypatch.setitem(datasets._FILES, name, hashlib.sha256(contents).hexdigest())


def idx(array):
    return gzip.compress(
        struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    )


@pytest.fixture(name="folder")
def _folder(tmp_path, monkeypatch):
    """Small files of the formats that the data sets come in."""
    images = np.arange(6 * 28 * 28, dtype=np.uint8).reshape(6, 28, 28)
    for part in ("train", "t10k"):
        put(tmp_path, monkeypatch, f"mnist/{part}-images-idx3-ubyte.gz", idx(images))
        put(tmp_path, monkeypatch, f"mnist/{part}-labels-idx1-ubyte.gz", idx(np.arange(6, dtype=np.uint8)))
    put(tmp_path, monkeypatch, "notmnist/t10k-images-idx3-ubyte.gz", idx(images))
    monkeypatch.setenv("PYRO_APD_DATA", str(tmp_path))
    return tmp_path


def png(pixels):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, contents in members.items():
            archive.writestr(name, contents)
    return file.getvalue()


def test_mnist_has_pixels_from_minus_one_to_one(folder):
    data = datasets.mnist()
    assert data.x_train.shape == data.x_test.shape == (6, 784)
    assert (float(data.x_train.min()), float(data.x_train.max())) == (-1.0, 1.0)
    assert data.x_train[0, 1].item() == pytest.approx(1 / 127.5 - 1)
    assert data.y_test.tolist() == [0, 1, 2, 3, 4, 5]
    assert data.y_test.dtype == torch.int64
    assert torch.equal(datasets.mnist(folder).x_train, data.x_train)


def test_a_number_of_images_is_spaced_evenly(folder):
    whole = datasets.notmnist(6)
    assert torch.equal(datasets.notmnist(3), whole[[0, 2, 4]])
    with pytest.raises(ValueError, match="between 1 and 6, the number of images; got 7"):
        datasets.notmnist(7)


def test_omniglot_is_light_on_dark_and_each_picture_once(folder, monkeypatch):
    white, inked = np.full((105, 105), 255, np.uint8), np.zeros((105, 105), np.uint8)
    first = {"small1/Greek/a.png": png(white), "small1/Greek/b.png": png(inked), "small1/readme.txt": b"no picture"}
    put(folder, monkeypatch, "omniglot/images_background_small1.zip", zipped(first))
    second = {"small2/Greek/a.png": png(white), "small2/Latin/a.png": png(inked)}
    put(folder, monkeypatch, "omniglot/images_background_small2.zip", zipped(second))
    images = datasets.omniglot(3)
    assert images.shape == (3, 784)
    assert images.mean(1).tolist() == pytest.approx([-1.0, 1.0, 1.0])


def test_cifar_is_grey_and_cut_to_its_middle(folder, monkeypatch):
    images = np.zeros((2, 32, 32, 3), np.uint8)
    images[0, 2:30, 2:30] = 255
    images[1, :, :, 1] = 255  # green
    file = io.BytesIO()
    np.savez(file, images=images)
    put(folder, monkeypatch, "cifar10_gray/cifar10_test2000.npz", file.getvalue())
    gray = datasets.cifar10_gray(2)
    assert gray.shape == (2, 784)
    torch.testing.assert_close(gray[0], torch.ones(784))
    torch.testing.assert_close(gray[1], torch.full((784,), 2 * 0.587 - 1))


def test_a_file_that_is_not_there_or_another(folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"omniglot/images_background_small1.zip is not there.*Nothing is down"):
        datasets.omniglot()
    (folder / "mnist/t10k-labels-idx1-ubyte.gz").write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not the file that is meant: its SHA-256 is"):
        datasets.mnist()
    monkeypatch.delenv("PYRO_APD_DATA")
    with pytest.raises(FileNotFoundError, match="PYRO_APD_DATA, which is not set"):
        datasets.mnist()


@pytest.mark.data
@pytest.mark.skipif("PYRO_APD_DATA" not in os.environ, reason="PYRO_APD_DATA names no folder of data")
def test_the_real_files():
    data = datasets.mnist()
    assert (len(data.x_train), len(data.x_test)) == (60_000, 10_000)
    assert data.y_test[:5].tolist() == [7, 2, 1, 0, 4]
    for images in (datasets.notmnist(50), datasets.omniglot(50), datasets.cifar10_gray(50)):
        assert images.shape == (50, 784)
        assert -1 <= float(images.min()) < float(images.max()) <= 1
