# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Errors of a model on its arguments: which argument does not fit, and how to fix it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from pyro_apd.errors import DataError, ModelError
from pyro_apd.runtime.trees import tree_flatten_with_path

# Words in torch's error messages about incompatible dtypes.
_ABOUT_TYPES = ("dtype", "scalar type", "same type")


def argument_name(path: Sequence[Any]) -> str:
    """``#0`` for the first positional argument, ``'y'`` for the keyword ``y``, followed by the path of a nested leaf.

    :param path: of a leaf of ``(args, kwargs)``, as torch's ``tree_flatten_with_path`` gives it.
    """
    is_keyword = str(path[0]) == "[1]"
    key = str(path[1]).strip("[]'\"")
    return (repr(key) if is_keyword else f"#{key}") + "".join(str(step) for step in path[2:])


def named_tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors among the arguments, by name."""
    leaves = tree_flatten_with_path((args, dict(kwargs)))[0]
    return {argument_name(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def check_one_device(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises DataError if data lie on several devices. Scalars may lie on any device, as in torch."""
    devices = {name: str(value.device) for name, value in named_tensors(args, kwargs).items() if value.dim() > 0}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise DataError(
            f"The model's arguments lie on different devices: {where}. Move all of them to one, such as "
            f"x.to('{next(iter(devices.values()))}')."
        )


def drawn_latents(trace: Any) -> dict[str, Tensor]:
    """The latents in a Pyro trace, also in the incomplete trace of a model that failed."""
    return {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and isinstance(site["value"], Tensor)
    }


@contextmanager
def explaining_errors(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], latents: Callable[[], Mapping[str, Tensor]]
) -> Iterator[None]:
    """Context in which a model runs. If it fails because an argument does not fit, the error says so.

    :param args: the model's arguments, and ``kwargs`` its keyword arguments.
    :param latents: returns the values of the latents that were drawn before the failure, by site.
    :raises DataError: in place of a RuntimeError, where dtype or device of an argument are not those of the latents.
    :raises ModelError: in place of a TypeError, where the model does not take such arguments.
    """
    try:
        yield
    except RuntimeError as error:
        reason = _mismatch(str(error), named_tensors(args, kwargs), latents())
        if reason:
            raise DataError(f"The model fails on its arguments ({str(error).splitlines()[0]}): {reason}") from error
        raise
    except TypeError as error:
        if "argument" in str(error) and not latents():
            given = ", ".join([type(arg).__name__ for arg in args] + [f"{name}=" for name in kwargs])
            raise ModelError(
                f"The model cannot be called as model({given}): {error}. Its arguments are those of mcmc.run(...). It "
                "must be a Pyro model with sample sites; apd.BNN(net) makes one of a plain torch.nn.Module."
            ) from error
        raise


def _mismatch(message: str, tensors: Mapping[str, Tensor], latents: Mapping[str, Tensor]) -> str:
    """Which argument does not fit, and how to fix it; empty where none is found."""
    floating = {name: value for name, value in latents.items() if value.is_floating_point()}
    if not floating:
        return ""
    site, like = next(iter(floating.items()))
    is_about_types = any(words in message for words in _ABOUT_TYPES)
    for name, value in tensors.items():
        if value.dim() > 0 and value.device != like.device:
            return (
                f"argument {name} is on {value.device} and latent site '{site}' on {like.device}. Move the data, "
                f"x.to('{like.device}'), or the model with its priors, model.to('{value.device}')."
            )
        wrong = value.is_floating_point() and value.dtype != like.dtype
        # Integers may be labels, but never the inputs of a layer.
        if is_about_types and (wrong or (value.dim() > 1 and not value.is_floating_point())):
            return (
                f"argument {name} is {value.dtype} and latent site '{site}' is {like.dtype}. Use x.to({like.dtype}), "
                "or give the priors the dtype of the data."
            )
    return ""
