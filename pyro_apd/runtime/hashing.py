# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A short name for data, so that a file can say which data it was made from without holding them."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor


def fingerprint(*data: Any) -> dict[str, Any]:
    """SHA-256, dtypes and shapes of tensors: the same for the same numbers in the same order, on any device.

    It goes into a file as ``posterior.metadata["data"] = fingerprint(x, y)``, and tells later whether other data are
    the same. It gives nothing of the data away but to who can guess all of them.

    :param data: tensors, or what :func:`torch.as_tensor` makes one of.
    :returns: ``{"sha256": str, "tensors": [{"dtype": str, "shape": list}, ...]}``, which JSON holds.
    :raises ValueError: if there are no data, or one is nothing that a tensor can be made of.
    """
    if not data:
        raise ValueError("fingerprint() needs at least one tensor, such as fingerprint(x, y).")
    digest, tensors = hashlib.sha256(), []
    for value in data:
        try:
            tensor: Tensor = torch.as_tensor(value).detach().cpu().contiguous()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"Data must be tensors or arrays of numbers; got {type(value).__name__}.") from error
        name, shape = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
        digest.update(f"{name} {shape}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        tensors.append({"dtype": name, "shape": shape})
    return {"sha256": digest.hexdigest(), "tensors": tensors}
