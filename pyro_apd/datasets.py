# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Real data sets, and out-of-distribution inputs.

The digits come with scikit-learn. Larger sets are read from a folder that the environment variable ``PYRO_APD_DATA``
names, or ``root``; nothing is downloaded. Images are rows of pixels in [-1, 1], as in Wang et al. (2018).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import operator
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

#: Names the folder that data sets too large to embed are read from.
DATA_VARIABLE = "PYRO_APD_DATA"

# SHA-256 of each file, and where people find it.
_FILES = {
    "mnist/train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "mnist/train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "mnist/t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "mnist/t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    "notmnist/t10k-images-idx3-ubyte.gz": "70ae9e06201f2827e5b0a3781a3169d735dd2efc69996b9eeaee7f10ed4044d7",
    "omniglot/images_background_small1.zip": "f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4",
    "omniglot/images_background_small2.zip": "3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f",
    "cifar10_gray/cifar10_test2000.npz": "3b4f247eab8ed22429e2f0cf793ac11fd8b534cfa16be171d3867c553bec04b8",
}
_ORIGINS = {
    "mnist": "the four idx.gz files of MNIST (LeCun et al. 1998)",
    "notmnist": "the test images of notMNIST (Bulatov 2011) as idx.gz",
    "omniglot": "images_background_small1.zip and images_background_small2.zip of Omniglot (Lake et al. 2015)",
    "cifar10_gray": "cifar10_test2000.npz: 'images' (2000, 32, 32, 3), the first of CIFAR-10's test set "
    "(Krizhevsky 2009)",
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Inputs and labels, in two parts.

    :ivar Tensor x_train: inputs ``(N, ...)``, float32.
    :ivar Tensor y_train: labels ``(N,)``, int64.
    :ivar Tensor x_test: inputs ``(M, ...)``, float32.
    :ivar Tensor y_test: labels ``(M,)``, int64.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    def to(self, device: torch.device | str) -> Dataset:
        """The same on another device."""
        return Dataset(self.x_train.to(device), self.y_train.to(device), self.x_test.to(device), self.y_test.to(device))


def digits(seed: int = 0, test_size: float | int = 0.2) -> Dataset:
    """The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn brings along (Alpaydin & Kaynak, 1998).

    Inputs ``(N, 64)`` in [-1, 1], as in Wang et al. (2018); labels 0 to 9. The split keeps the shares of the classes.

    :param int seed: decides which image is in which part.
    :param test_size: share of the images to test with, in (0, 1), or their number.
    :raises ImportError: if scikit-learn is not installed.
    :raises ValueError: if ``test_size`` leaves a part with fewer images than classes.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "The digits come with scikit-learn, which is missing: pip install 'pyro-apd[demo]'."
        ) from error
    bundle = load_digits()
    total = len(bundle.target)
    num_test = test_size if isinstance(test_size, int) else round(test_size * total)
    if not 10 <= num_test <= total - 10:
        raise ValueError(
            f"`test_size` must leave at least 10 of {total} images, one per class, on either side; got {test_size!r}. "
            "Give a share in (0, 1) or a number of images."
        )
    x_train, x_test, y_train, y_test = train_test_split(
        bundle.data, bundle.target, test_size=num_test, random_state=operator.index(seed), stratify=bundle.target
    )
    # Pixels count from 0 to 16.
    return Dataset(
        x_train=torch.as_tensor(x_train, dtype=torch.float32) / 8 - 1,
        y_train=torch.as_tensor(y_train, dtype=torch.int64),
        x_test=torch.as_tensor(x_test, dtype=torch.float32) / 8 - 1,
        y_test=torch.as_tensor(y_test, dtype=torch.int64),
    )


def noise(like: Tensor, seed: int = 0) -> Tensor:
    """Independent uniform noise in the range of ``like``, with its shape, dtype and device.

    :param torch.Tensor like: inputs of a floating dtype.
    :param int seed: the same seed gives the same noise on every device; the global generators are not touched.
    :raises ValueError: if ``like`` is empty or not of a floating dtype.
    """
    if not like.is_floating_point() or like.numel() == 0:
        raise ValueError(f"`like` must hold inputs of a floating dtype; got shape {tuple(like.shape)}, {like.dtype}.")
    generator = torch.Generator().manual_seed(operator.index(seed))
    unit = torch.rand(like.shape, generator=generator, dtype=like.dtype).to(like.device)
    low, high = like.aminmax()
    return low + (high - low) * unit


def inverted(x: Tensor) -> Tensor:
    """Images with light and dark exchanged.

    :param torch.Tensor x: images with values in [-1, 1].
    :raises ValueError: if values are out of that range.
    """
    if not bool((x.abs() <= 1).all()):
        raise ValueError(
            f"`x` must have values in [-1, 1]; got {float(x.min()):g} to {float(x.max()):g}. Scale it first: for "
            "values in [0, 1], 2 * x - 1."
        )
    return -x


def mnist(root: str | os.PathLike[str] | None = None) -> Dataset:
    """MNIST: 60,000 images to train with, 10,000 to test with, ``(N, 784)`` in [-1, 1].

    :param root: folder that holds ``mnist/``; by default what ``PYRO_APD_DATA`` names.
    :raises FileNotFoundError: if a file is missing; the message says what belongs where.
    :raises ValueError: if a file is not the one that is meant.
    """
    x_train, x_test = (_as_images(_idx(root, f"mnist/{part}-images-idx3-ubyte.gz")) for part in ("train", "t10k"))
    y_train, y_test = (_idx(root, f"mnist/{part}-labels-idx1-ubyte.gz") for part in ("train", "t10k"))
    return Dataset(x_train, _labels(y_train), x_test, _labels(y_test))


def notmnist(count: int = 2000, root: str | os.PathLike[str] | None = None) -> Tensor:
    """Glyphs A to J in many typefaces, ``(count, 784)`` in [-1, 1]. Arguments and errors as :func:`mnist`."""
    return _as_images(_spaced(_idx(root, "notmnist/t10k-images-idx3-ubyte.gz"), count))


def omniglot(count: int = 2000, root: str | os.PathLike[str] | None = None) -> Tensor:
    """Handwritten characters of many alphabets, light on dark, ``(count, 784)`` in [-1, 1].

    Reduced to 28 x 28 by averaging over areas. Arguments and errors as :func:`mnist`.
    """
    from PIL import Image

    pictures: dict[str, bytes] = {}
    for name in ("images_background_small1.zip", "images_background_small2.zip"):
        with zipfile.ZipFile(io.BytesIO(_contents(root, f"omniglot/{name}"))) as archive:
            for member in archive.namelist():
                if member.endswith(".png"):  # two alphabets are in both files
                    pictures.setdefault(member.split("/", 1)[1], archive.read(member))
    names = sorted(pictures)
    chosen = [names[i] for i in _positions(len(names), count)]
    ink = [np.asarray(Image.open(io.BytesIO(pictures[name])).convert("L"), np.float32) for name in chosen]
    dark_N1HW = 255 - torch.as_tensor(np.stack(ink)).unsqueeze(1)
    return _as_images(torch.nn.functional.interpolate(dark_N1HW, (28, 28), mode="area").squeeze(1).numpy())


def cifar10_gray(count: int = 2000, root: str | os.PathLike[str] | None = None) -> Tensor:
    """Photographs in shades of grey, cut to their middle 28 x 28 pixels, ``(count, 784)`` in [-1, 1].

    Luma after ITU-R BT.601. Arguments and errors as :func:`mnist`.
    """
    with np.load(io.BytesIO(_contents(root, "cifar10_gray/cifar10_test2000.npz")), allow_pickle=False) as archive:
        images = _spaced(archive["images"], count)
    gray = images[:, 2:30, 2:30].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return _as_images(gray)


def _as_images(pixels: np.ndarray) -> Tensor:
    """Pixels 0 to 255 as rows in [-1, 1]."""
    return torch.as_tensor(pixels.reshape(len(pixels), -1).astype(np.float32)) / 127.5 - 1


def _labels(classes: np.ndarray) -> Tensor:
    return torch.as_tensor(classes.astype(np.int64))


def _spaced(rows: np.ndarray, count: int) -> np.ndarray:
    chosen: np.ndarray = rows[_positions(len(rows), count)]
    return chosen


def _positions(total: int, count: int) -> np.ndarray:
    """``count`` positions among ``total``, evenly spaced, so that files sorted by class give all classes."""
    if not 1 <= count <= total:
        raise ValueError(f"`count` must be between 1 and {total}, the number of images; got {count}.")
    return np.arange(count) * total // count


def _idx(root: str | os.PathLike[str] | None, name: str) -> np.ndarray:
    """An array in the idx format of LeCun's files: two zeros, the type, the number of dimensions, their sizes."""
    contents = gzip.decompress(_contents(root, name))
    num_dims = contents[3]
    shape = np.frombuffer(contents, ">u4", num_dims, offset=4)
    return np.frombuffer(contents, np.uint8, offset=4 + 4 * num_dims).reshape(shape)


def _contents(root: str | os.PathLike[str] | None, name: str) -> bytes:
    """A file's bytes, once it is known to be the right file."""
    folder = os.environ.get(DATA_VARIABLE) if root is None else root
    kind = name.split("/")[0]
    if folder is None or not (Path(folder) / name).is_file():
        where = f"the environment variable {DATA_VARIABLE}, which is not set" if folder is None else str(folder)
        raise FileNotFoundError(
            f"{name} is not there; looked in {where}. Nothing is downloaded: get {_ORIGINS[kind]}, put them into a "
            f"folder '{kind}', and name the folder around it in {DATA_VARIABLE} or `root`."
        )
    contents = (Path(folder) / name).read_bytes()
    found = hashlib.sha256(contents).hexdigest()
    if found != _FILES[name]:
        raise ValueError(
            f"{Path(folder) / name} is not the file that is meant: its SHA-256 is {found}, expected {_FILES[name]}. "
            f"Get {_ORIGINS[kind]} again."
        )
    return contents
