# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A digest of data, by which a file can name the data it was made from without containing them."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor


def fingerprint(*data: Any) -> dict[str, Any]:
    """SHA-256, dtypes and shapes of tensors: the same for the same numbers in the same order, on any device.

    Store it in a file by ``posterior.metadata["data"] = fingerprint(x, y)``, and compare it with that of other data
    later. It reveals no data, except to someone who can guess all of them.

    :param data: tensors, or values that :func:`torch.as_tensor` converts.
    :returns: ``{"sha256": str, "tensors": [{"dtype": str, "shape": list}, ...]}``, which is valid JSON.
    :raises ValueError: if there are no data, or a value cannot be converted.
    """
    if not data:
        raise ValueError("fingerprint() needs at least one tensor, such as fingerprint(x, y).")
    digest = hashlib.sha256()
    tensors = []
    for value in data:
        try:
            tensor: Tensor = torch.as_tensor(value).detach().cpu().contiguous()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"Data must be tensors or arrays of numbers; got {type(value).__name__}. Convert it by torch.as_tensor."
            ) from error
        name = str(tensor.dtype).removeprefix("torch.")
        shape = list(tensor.shape)
        digest.update(f"{name} {shape}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        tensors.append({"dtype": name, "shape": shape})
    return {"sha256": digest.hexdigest(), "tensors": tensors}
