# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Checks of tensors that users give: class probabilities, labels and inputs, each with one clear error."""

from __future__ import annotations

import torch
from torch import Tensor

#: What the capital letters of an argument's name stand for.
_DIMENSIONS = {"S": "draws", "N": "data", "K": "classes"}


def shape_of(value: object) -> str:
    """Shape and dtype of a tensor, for errors; the type of anything else."""
    if not isinstance(value, Tensor):
        return f"{type(value).__name__}"
    layout = "" if value.layout == torch.strided else " (sparse)"
    return f"shape {tuple(value.shape)} of {value.dtype}{layout}"


def is_dense(value: object) -> bool:
    """Whether ``value`` is an ordinary tensor, not a sparse one."""
    return isinstance(value, Tensor) and value.layout == torch.strided


def checked_probabilities(name: str, probs: Tensor) -> Tensor:
    """Class probabilities, in single precision at least.

    :param str name: of the argument, whose capital letters are its dimensions, as in ``probs_SNK``.
    :param Tensor probs: probabilities; classes along the last dimension.
    :raises ValueError: if ``probs`` is no tensor of this shape, has no draw or no class, holds NaN or negative numbers,
        or does not sum to one over classes.
    """
    letters = name.rpartition("_")[2]
    if not is_dense(probs) or not probs.is_floating_point():
        raise ValueError(
            f"{name} must be a floating-point tensor of class probabilities; got {shape_of(probs)}. Use "
            "torch.as_tensor(...) of an array, and to_dense() of a sparse tensor."
        )
    sizes = dict(zip(letters, probs.shape, strict=False))
    if probs.dim() != len(letters) or sizes["K"] < 1 or sizes.get("S", 1) < 1:
        least = "at least one draw and one class" if "S" in letters else "at least one class"
        hint = (
            " For a single draw pass probs.unsqueeze(0)." if "S" in letters else " Average over draws: probs.mean(0)."
        )
        raise ValueError(
            f"{name} must have shape ({', '.join(_DIMENSIONS[letter] for letter in letters)}) with {least}; got "
            f"{tuple(probs.shape)}.{hint}"
        )
    if probs.dtype in (torch.float16, torch.bfloat16):
        tolerance, probs = torch.finfo(probs.dtype).eps ** 0.5, probs.float()
    else:
        tolerance = max(1e-5, torch.finfo(probs.dtype).eps ** 0.5)
    total = probs.sum(-1)
    # One read from the device where all is well; NaN fails both comparisons.
    if not bool((probs >= 0).all() & ((total - 1).abs() <= tolerance).all()):
        raise _not_probabilities(name, probs, total)
    return probs


def _not_probabilities(name: str, probs: Tensor, total: Tensor) -> ValueError:
    if probs.isnan().any():
        return ValueError(f"{name} holds {int(probs.isnan().sum())} NaN; look at the draws or inputs they are of.")
    if (probs < 0).any():
        return ValueError(
            f"{name} holds negative entries, the least {float(probs.min()):.4g}; probabilities are wanted, not "
            f"logits or log-probabilities: use softmax(-1) or exp()."
        )
    worst = total.flatten()[(total - 1).abs().argmax()]
    return ValueError(
        f"{name} must sum to one over the last dimension; a sum of {float(worst):.6g} was found. Classes belong in "
        f"the last dimension, logits need softmax(-1), and a single probability p of a binary label is (1 - p, p)."
    )


def checked_labels(name: str, labels: Tensor, num_data: int, num_classes: int | None = None) -> Tensor:
    """Labels ``(N,)`` as indices of classes, ``int64``.

    :param str name: of the argument.
    :param Tensor labels: of any dtype that holds whole numbers.
    :param int num_data: N.
    :param int num_classes: K, where it is known.
    :raises ValueError: if ``labels`` is no tensor of that shape, or holds anything but 0 to K - 1.
    """
    if not is_dense(labels) or labels.is_complex() or tuple(labels.shape) != (num_data,):
        raise ValueError(
            f"{name} must be a tensor of classes, one for each of {num_data} data, ({num_data},); got "
            f"{shape_of(labels)}."
        )
    index = labels.long()
    is_class = (index >= 0) & (index == labels)
    if num_classes is not None:
        is_class &= index < num_classes
    if not bool(is_class.all()):
        most = "K - 1" if num_classes is None else f"{num_classes - 1}"
        wrong = int((~is_class).nonzero()[0])
        raise ValueError(
            f"{name} must be whole numbers from 0 to {most}; got {labels[wrong].item():g} in row {wrong}, and values "
            f"from {float(labels.min()):g} to {float(labels.max()):g}. Number the classes from 0."
        )
    return index


def check_inputs(name: str, x: Tensor, *, is_real: bool = True) -> None:
    """Refuses what cannot be rows of inputs.

    :param str name: of the argument.
    :param Tensor x: inputs ``(N, ...)``.
    :param bool is_real: whether they must be floating-point; else whole numbers are accepted, as of an embedding.
    :raises ValueError: if ``x`` is no tensor with a row, or not finite.
    """
    is_fit = is_dense(x) and x.dim() > 0 and x.numel() > 0 and not x.is_complex()
    if not is_fit or (is_real and not x.is_floating_point()):
        kind = "floating-point tensor" if is_real else "tensor"
        raise ValueError(f"{name} must be a {kind} of inputs (N, ...) with at least one row; got {shape_of(x)}.")
    if x.is_floating_point() and not bool(x.isfinite().all()):
        is_bad_N = ~x.isfinite().flatten(1).all(1) if x.dim() > 1 else ~x.isfinite()
        raise ValueError(
            f"{name} holds NaN or infinity in {int(is_bad_N.sum())} of {len(x)} rows, the first row "
            f"{int(is_bad_N.nonzero()[0])}; remove or fix the rows concerned."
        )
