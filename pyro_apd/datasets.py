# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Small real data that need no download, and inputs that no model trained on them should be sure about."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
            f"`test_size` must leave at least 10 of {total} images, one a class, on either side; got {test_size!r}. "
            "Give a share in (0, 1) or a number of images."
        )
    x_train, x_test, y_train, y_test = train_test_split(
        bundle.data, bundle.target, test_size=num_test, random_state=seed, stratify=bundle.target
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
    generator = torch.Generator().manual_seed(seed)
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
