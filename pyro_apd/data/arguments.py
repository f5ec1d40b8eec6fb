# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Errors of a model on its arguments: which argument does not fit, and how to fix it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import Dataset

from pyro_apd.errors import DataError, ModelError
from pyro_apd.runtime.trees import tree_flatten_with_path

# Words in torch's error messages about incompatible dtypes, and about incompatible shapes.
_ABOUT_TYPES = ("type", "bool tensors")
_ABOUT_SHAPES = ("shape", "size", "dimension", "broadcast", "channels", "must be a Tensor", "instances of Number")


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


def not_finite(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> DataError | None:
    """The error that names the first argument with NaN or infinite entries; None where there is none."""
    for name, value in named_tensors(args, kwargs).items():
        # The extremes are NaN or infinite where any entry is, and take a fraction of the time that testing each takes.
        if value.layout is not torch.strided:
            continue  # refused by name where rows are taken
        if value.is_floating_point() and value.numel() and not bool(torch.isfinite(torch.stack(value.aminmax())).all()):
            bad = int((~torch.isfinite(value)).sum())
            return DataError(
                f"Argument {name} of the model, shape {tuple(value.shape)}, holds {bad} NaN or infinite entries. "
                "Remove or impute those rows before sampling. To leave missing targets out, use `with "
                "pyro.poutine.mask(mask=~y.isnan()):` around the observed site, and obs=y.nan_to_num() in it."
            )
    return None


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
    :raises DataError: in place of a RuntimeError or ValueError, where dtype or device of an argument are not those of
        the latents.
    :raises ModelError: in place of a TypeError, where the model does not take such arguments.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:  # recurrent layers raise a ValueError
        if isinstance(error, (DataError, ModelError)):
            raise
        reason = _mismatch(str(error), named_tensors(args, kwargs), latents())
        if reason:
            raise DataError(f"The model fails on its arguments ({_first_line(error)}): {reason}") from error
        raise
    except TypeError as error:
        if "argument" in str(error) and not latents():
            given = ", ".join([type(arg).__name__ for arg in args] + [f"{name}=" for name in kwargs])
            raise ModelError(
                f"The model cannot be called as model({given}): {error}. Its arguments are those of mcmc.run(...). It "
                "must be a Pyro model with sample sites; apd.BNN(net) makes one of a plain torch.nn.Module."
            ) from error
        raise


def explain_arguments(error: Exception, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises DataError that lists the arguments, where a model failed because of kinds, types or shapes."""
    if isinstance(error, (TypeError, AttributeError, ValueError)):
        kinds = _kinds(error, args, kwargs)
        if kinds:
            raise DataError(f"The model fails on its arguments ({_first_line(error)}): {kinds}") from error
    if isinstance(error, (RuntimeError, ValueError)) and any(
        word in str(error) for word in (*_ABOUT_TYPES, *_ABOUT_SHAPES)
    ):
        given = [f"{name} {value.dtype} {tuple(value.shape)}" for name, value in named_tensors(args, kwargs).items()]
        raise DataError(
            f"The model fails on its arguments ({_first_line(error)}). It was called with {', '.join(given)}: check "
            "the order of the arguments, as in mcmc.run(x, y), their shapes and dtypes. Densities of torch take labels "
            "0 and 1 as floating numbers, y.float()."
        ) from error


def explain_sources(error: Exception, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises DataError where arguments are data sets or batches, whatever a model that failed says of them."""
    given = (*args, *kwargs.values())
    if any(isinstance(arg, Dataset) for arg in given) or (
        len(given) == len(args) == 1 and _is_list_of_batches(args[0])
    ):
        kinds = _kinds(error, args, kwargs)
        raise DataError(f"The model fails on its arguments ({_first_line(error)}): {kinds}") from error


def _kinds(error: Exception, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Which arguments are no tensors, and what to pass; empty where all can be what a model computes with."""
    named = [*((f"#{i}", arg) for i, arg in enumerate(args)), *((repr(name), arg) for name, arg in kwargs.items())]
    if any(isinstance(arg, Dataset) for _, arg in named):
        advice = "Pass torch.utils.data.DataLoader(dataset, batch_size=..., shuffle=True) as the only argument."
    elif len(named) == len(args) == 1 and _is_list_of_batches(args[0]):
        advice = "It looks like batches: give the kernel num_data=N, their number of rows, to take them one by one."
    elif len(named) == len(args) == 1 and isinstance(args[0], Mapping) and not isinstance(error, ValueError):
        advice = "Arguments by name are passed as mcmc.run(**data)."
    elif named and all(isinstance(arg, (str, bytes)) for _, arg in named):
        advice = "Files are not read: pass tensors, as in mcmc.run(x, y), or a DataLoader."
    elif any(isinstance(arg, (list, tuple, np.ndarray)) for _, arg in named):
        advice = "Models compute with tensors: use torch.as_tensor(...)."
    else:
        return ""
    kinds = (Dataset, list, tuple, np.ndarray, Mapping, str, bytes)
    found = [f"{name} is a {type(arg).__name__}" for name, arg in named if isinstance(arg, kinds)]
    return f"{', '.join(found)[:300]}. {advice}"


def _is_list_of_batches(value: Any) -> bool:
    """Whether all items of a list are tuples, lists or dicts of tensors with rows."""
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(i, (list, tuple, dict)) for i in value):
        return False
    leaves = [leaf for path, leaf in tree_flatten_with_path(value)[0]]
    return bool(leaves) and all(isinstance(leaf, Tensor) and leaf.dim() > 0 for leaf in leaves)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def check_kinds(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Checks that arguments are of a kind that can be given to a model.

    :raises DataError: for data frames, sparse data, and where there are no rows.
    """
    for path, leaf in tree_flatten_with_path((args, dict(kwargs)))[0]:
        problem = _unfit_kind(leaf)
        if problem:
            raise DataError(f"Argument {argument_name(path)} of the model is {problem}")
    lengths = {name: len(leaf) for name, leaf in _with_rows(args, kwargs)}
    if lengths and next(iter(lengths.values())) == 0:
        raise DataError(f"Argument {next(iter(lengths))} of the model has no rows: there are no data to learn from.")


def _unfit_kind(leaf: Any) -> str:
    """What is wrong with the kind of an argument, and what to pass; empty where it can be used."""
    kind = type(leaf).__name__
    if isinstance(leaf, Tensor):
        return unfit_layout(leaf)
    if hasattr(leaf, "to_numpy"):
        return (
            f"a {kind}; models compute with tensors. Pass "
            'torch.tensor(x.to_numpy(dtype="float32")), and class labels as .to_numpy(dtype="int64").'
        )
    if isinstance(leaf, np.ma.MaskedArray):
        return (
            "a masked array, and its masked values would be read as data. Pass x.filled(0.0), and the mask as another "
            "argument for pyro.poutine.mask."
        )
    if hasattr(leaf, "nnz") and hasattr(leaf, "toarray"):
        return f"sparse ({kind}), and models compute with dense tensors. Pass torch.from_numpy(x.toarray())."
    return ""


def unfit_layout(tensor: Tensor) -> str:
    """What is wrong with the layout of a tensor, and what to pass; empty where its rows can be taken."""
    if tensor.is_nested:
        return "nested, and rows of such tensors cannot be taken. Pass x.to_padded_tensor(0.0), and a mask."
    if tensor.layout != torch.strided:
        return f"sparse ({tensor.layout}), and rows of such tensors cannot be taken. Pass x.to_dense()."
    return ""


def check_batch(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Checks a batch of a loader, as the model's arguments.

    :raises DataError: if it does not consist of tensors with rows.
    """
    packed = [value for value in (*args, *kwargs.values()) if isinstance(value, PackedSequence)]
    if packed:
        raise DataError(
            "A batch holds a PackedSequence, whose rows cannot be taken. Give padded sequences and their lengths, and "
            "let the model pack them, or mask."
        )
    leaves = tree_flatten_with_path((args, dict(kwargs)))[0]
    for path, leaf in leaves:
        if not isinstance(leaf, Tensor):
            problem = f"a {type(leaf).__name__}, and must be a tensor with rows."
        else:
            problem = unfit_layout(leaf) or ("a tensor without rows." if leaf.dim() == 0 else "")
        if problem:
            raise DataError(
                f"A batch must consist of tensors with rows: entry {argument_name(path)} is {problem} Pass arguments "
                "that do not change as keywords of mcmc.run(...)."
            )
    if not leaves:
        raise DataError("A batch must consist of tensors with rows; got an empty one.")


def check_rows_first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Checks that the tensors of a batch, as the model's arguments, have as many rows as each other.

    :raises DataError: if they differ; of sequences whose first dimension is time it says so.
    """
    tensors = named_tensors(args, kwargs)
    if len({len(tensor) for tensor in tensors.values()}) < 2:
        return
    counts = {len(tensor) for tensor in tensors.values()}
    late = [name for name, t in tensors.items() if t.dim() > 1 and t.shape[1] in counts - {t.shape[0]}]
    hint = f" Is dimension 1 of {late[0]} the rows? Then use batch_first=True, or x.transpose(0, 1)." if late else ""
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    raise DataError(
        f"The tensors of a batch have different numbers of rows: {shapes[:300]}. Rows are the first dimension.{hint} "
        "Pass arguments that do not change as keywords of mcmc.run(...)."
    )


def _with_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Tensors and arrays with rows, by name."""
    for path, leaf in tree_flatten_with_path((args, dict(kwargs)))[0]:
        if isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim > 0:
            yield argument_name(path), leaf


def with_tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, with lists of a number for each row as tensors.

    A list of another length, such as one of layer sizes, is left as it is, and so is a list of batches. Mappings that
    are no dicts become dicts.
    """
    is_list = len(args) == 1 and isinstance(args[0], (list, tuple))  # whose tensors would be those of its batches
    num_rows = next((len(leaf) for _, leaf in _with_rows(() if is_list else args, kwargs)), 0)

    def converted(value: Any) -> Any:
        if isinstance(value, Mapping) and not isinstance(value, dict):  # what a tokenizer gives
            return dict(value)
        if not isinstance(value, (list, tuple)) or len(value) != num_rows or num_rows < 2:
            return value
        if any(isinstance(entry, Tensor) or _is_batch(entry) for entry in value):
            return value
        try:
            array = np.asarray(value)
        except ValueError:  # rows of unequal length
            return value
        if array.dtype.kind not in "biuf":
            return value
        return torch.as_tensor(array, dtype=torch.get_default_dtype() if array.dtype.kind == "f" else None)

    return tuple(map(converted, args)), {name: converted(value) for name, value in kwargs.items()}


def _is_batch(entry: Any) -> bool:
    """Whether an entry of a list is a sequence of tensors or arrays."""
    return isinstance(entry, (list, tuple)) and any(
        isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim > 0 for leaf in entry
    )


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
