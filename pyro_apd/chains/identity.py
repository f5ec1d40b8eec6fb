# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What identifies a run, so that a checkpoint continues this run and no other.

Settings are compared as they are, and data by a digest. The model is compared by what it computes: prior and likelihood
at a fixed point (:mod:`pyro_apd.models.fixed_point`), and the schedule by step sizes at some steps. These agree up to
rounding, which is another on another machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import mmap
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

from pyro_apd.chains.checkpoint import CheckpointError
from pyro_apd.chains.stores.base import as_bytes
from pyro_apd.data.row_reader import is_stored
from pyro_apd.data.samplers import preserved_random_states
from pyro_apd.runtime.trees import tree_flatten_with_path, tree_leaves

if TYPE_CHECKING:
    from pyro_apd.chains.settings import Settings
    from pyro_apd.kernels.base import StochasticGradientKernel
    from pyro_apd.kernels.engine.chain import Chain
    from pyro_apd.kernels.engine.schedules import Schedule

# Rows of a file of data that are part of the digest.
_STORED_ROWS = 1000
# Rows of other stored data, which may be expensive to read.
_READ_ROWS = 50
# Items of a dataset, which are read twice.
_ITEMS = 500
# Bytes that are copied from an accelerator, and summed, at a time.
_BLOCK_BYTES = 2**24
# Steps, evenly spaced over the run, at which step sizes are compared.
_NUM_STEPS = 64
# Differences, in a message.
_MAX_SHOWN = 3

# Relative differences that rounding may make: of step sizes, of the prior, of the likelihood, whose networks amplify
# it, and of gradients, which jump where a unit of a ReLU network switches.
_STEP_SIZE = 1e-6
_ENERGY = {"prior": 2e-5, "likelihood": 1e-4}
_GRADIENT = 1e-3
# The likelihood is a difference from the whole, of which this share may be rounding.
_ROUNDING = 1e-6
# Of numbers with fewer digits, so many times as much.
_SHORT_NUMBERS = {str(torch.float16): 10.0, str(torch.bfloat16): 100.0}


def check_identity(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compares the run of a checkpoint with the present one.

    :raises CheckpointError: if they differ; the message names the differences.
    """
    # Through JSON, as the file's: tuples become lists.
    expected = json.loads(json.dumps(expected))
    differences = []
    for name in {**expected, **found}:
        was, now = found.get(name), expected.get(name)
        if name == "model" and was and now:
            differences += _differing_parts(was, now, _SHORT_NUMBERS.get(expected.get("dtype", ""), 1.0))
        elif name == "data" and was and now:
            other = [argument for argument in {**was, **now} if was.get(argument) != now.get(argument)]
            differences += [f"argument {argument} of the model was given other data" for argument in other]
        elif name == "step sizes" and was and now:
            differences += _differing_steps(was, now)
        elif was != now:
            differences.append(f"{name} was {_short(was)}, now {_short(now)}")
    if differences:
        more = f"; and {len(differences) - _MAX_SHOWN} more" if len(differences) > _MAX_SHOWN else ""
        raise CheckpointError(
            f"The checkpoint '{path}' belongs to another run: {'; '.join(differences[:_MAX_SHOWN])}{more}. Run with "
            "the same model, data and settings to resume it, or give another checkpoint=."
        )


def run_identity(
    kernel: StochasticGradientKernel,
    settings: Settings,
    chain: Chain,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """What identifies a run, by the name of what would differ in another; JSON values.

    :param chain: one of its chains, before its first step.
    """
    plan = settings.plan
    of_kernel = constructor_settings(kernel)
    # An iterator gives each batch once, and those are the chain's.
    is_one_pass = any(isinstance(leaf, Iterator) for leaf in tree_leaves((tuple(args), dict(kwargs))))
    model = None if is_one_pass else chain.fixed_point_values()
    if model is not None:  # which says more than a name, and stays where code is moved
        of_kernel.pop("model", None)
    schedule: Schedule | None = of_kernel.get("schedule")
    if not dataclasses.is_dataclass(schedule):
        of_kernel.pop("schedule", None)
    return {
        "kernel": type(kernel).__name__,
        **{f"kernel.{name}": describe(value) for name, value in of_kernel.items()},
        "step sizes": step_sizes(schedule, plan.total * kernel.thinning),
        "seed": kernel.seed,
        "num_samples": plan.num_samples,
        "warmup_steps": plan.warmup_steps,
        "num_chains": plan.num_chains,
        "chain_method": settings.chain_method if plan.num_chains > 1 else None,
        "save_params": None if settings.save_params is None else sorted(settings.save_params),
        "initial_params": None if plan.initial_params is None else arguments_digest(dict(plan.initial_params)),
        "layout": [str(site) for site in chain.layout],
        "dtype": str(chain.theta.dtype),
        "data": data_digests(args, kwargs),
        "model": model,
    }


def constructor_settings(kernel: StochasticGradientKernel) -> dict[str, Any]:
    """What a kernel was made with, as far as its attributes show it, without what it found out since."""
    names = {"schedule"}  # what ``step_size`` became
    for base in type(kernel).__mro__:
        if "__init__" in vars(base):
            names.update(inspect.signature(vars(base)["__init__"]).parameters)
    names -= {"self", "seed", "layout", "prefetch"}  # how far is read ahead changes no draw
    return {name: value for name, value in sorted(vars(kernel).items()) if name in names}


def step_sizes(schedule: Schedule | None, num_steps: int) -> dict[str, float] | None:
    """Step sizes by step, evenly spaced over the run, with the first and the last; None without a schedule."""
    if schedule is None:
        return None
    last = max(num_steps - 1, 0)
    steps = sorted({i * last // (_NUM_STEPS - 1) for i in range(_NUM_STEPS)})
    return {str(step): float(schedule(step)) for step in steps}


def data_digests(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the arguments of a run by their names, see :func:`arguments_digest`."""
    positional = {f"#{i}": arguments_digest(arg) for i, arg in enumerate(args)}
    return positional | {repr(name): arguments_digest(arg) for name, arg in kwargs.items()}


def arguments_digest(values: Any) -> str:
    """A digest of an argument of a run, or of several, the same on any device.

    * Of tensors and of arrays in memory, all contents; of arrays in files a thousand evenly spaced rows, and of other
      stored data fifty.
    * Of a :class:`~torch.utils.data.DataLoader` the settings that decide about batches, and its tensors where it is
      over a :class:`~torch.utils.data.TensorDataset`, or over parts of some; of other datasets all items up to 500, or
      so many evenly spaced ones, unless they are others at each reading.
    * Of other values, such as functions, the type. What the model makes of them, and of the first batch of a loader, is
      in :func:`~pyro_apd.models.fixed_point.fixed_point_values`.
    """
    digest = hashlib.sha256()
    for path, leaf in tree_flatten_with_path(values)[0]:
        digest.update(repr([str(key) for key in path]).encode())
        _add_leaf(digest, leaf)
    return digest.hexdigest()[:16]


def describe(value: Any) -> Any:
    """A setting as a JSON value that is the same in every process."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, Tensor):
        return arguments_digest(value)
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [describe(item) for item in value]
    return getattr(value, "__qualname__", None) or type(value).__qualname__


# -- comparison -------------------------------------------------------------------------------------------------------


def _differing_parts(found: Mapping[str, Any], expected: Mapping[str, Any], factor: float) -> list[str]:
    """What differs of prior and likelihood, in words."""
    prior = found["prior"]
    differences = []
    for name in ("prior", "likelihood"):
        was, now = found[name], expected[name]
        if was is None or now is None:
            if was is not now:
                differences.append(
                    "the first batch of the data " + ("now differs from call to call" if was else "was not repeatable")
                )
            continue
        floor = _ROUNDING if name == "likelihood" else 0.0
        sites = _differing_sites(was, now, prior, floor, factor)
        scale = abs(was["energy"]) + was["length"] * _norm(was)
        allowed = factor * (_ENERGY[name] * scale + floor * abs(prior["energy"]))
        if sites or not _is_close(was["energy"], now["energy"], allowed):
            where = f" of sites {_short(sites)}" if sites and name == "prior" else ""
            differences.append(
                f"the {name}{where} is another (-log {name} at a fixed point was {was['energy']:.7g}, now "
                f"{now['energy']:.7g})"
            )
    return differences


def _differing_sites(
    found: Mapping[str, Any], expected: Mapping[str, Any], prior: Mapping[str, Any], floor: float, factor: float
) -> list[str]:
    """Names of the sites whose gradients differ by more than rounding; of others than both have, nothing is said."""
    whole = _norm(found)
    names = []
    for site, was in found["gradient"].items():
        now = expected["gradient"].get(site, was)
        allowed = _GRADIENT * was[0] + _ROUNDING * whole + floor * prior["gradient"][site][0]
        if not all(_is_close(one, other, factor * allowed) for one, other in zip(was, now, strict=True)):
            names.append(site)
    return names


def _norm(part: Mapping[str, Any]) -> float:
    return math.hypot(*(norm for norm, _ in part["gradient"].values()))


def _is_close(one: float, other: float, allowed: float) -> bool:
    if not (math.isfinite(one) and math.isfinite(other)):
        return not (math.isfinite(one) or math.isfinite(other))
    return not math.isfinite(allowed) or abs(one - other) <= allowed


def _differing_steps(found: Mapping[str, float], expected: Mapping[str, float]) -> list[str]:
    """The first step whose size differs, in words; other lengths of the run are said elsewhere."""
    for step, was in found.items():
        now = expected.get(step, was)
        if not _is_close(was, now, _STEP_SIZE * abs(was)):
            return [f"the step size at step {step} was {was:g}, now {now:g}"]
    return []


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


# -- digests ----------------------------------------------------------------------------------------------------------


def _add_leaf(digest: Any, leaf: Any) -> None:
    if isinstance(leaf, Tensor):
        digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
        flat = leaf.detach().reshape(-1)
        step = max(_BLOCK_BYTES // max(leaf.element_size(), 1), 1)
        for start in range(0, flat.numel(), step):
            _add_bytes(digest, as_bytes(flat[start : start + step]))
    elif isinstance(leaf, (DataLoader, TensorDataset, Subset, ConcatDataset)):
        _add_loader(digest, leaf)
    elif isinstance(leaf, (np.ndarray, np.generic)):
        _add_array(digest, leaf)
    elif leaf is None or isinstance(leaf, (bool, int, float, str, bytes)):
        digest.update(repr(leaf).encode())
    else:
        digest.update(type(leaf).__qualname__.encode())
        if is_stored(leaf):
            digest.update(str(len(leaf)).encode())
            for row in _read_rows(leaf):
                _add_array(digest, row)


def _add_bytes(digest: Any, data: memoryview) -> None:
    """Adds a checksum of ``data``: twice as fast as a cryptographic digest, and nobody is deceived here."""
    digest.update(f"{len(data)} {zlib.crc32(data)}".encode())


def _add_array(digest: Any, values: Any) -> None:
    array = np.asarray(values)
    digest.update(f"{array.dtype.str}{array.shape}".encode())
    if not array.size or array.dtype.hasobject:
        return
    if array.ndim and _is_in_file(array):
        array = array[:: max(1, len(array) // _STORED_ROWS)]
    _add_bytes(digest, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _is_in_file(array: Any) -> bool:
    """Whether an array maps a file, or is part of one that does."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return isinstance(array.obj if isinstance(array, memoryview) else array, mmap.mmap)


def _add_loader(digest: Any, leaf: Any) -> None:
    """A loader, or a dataset whose tensors are in memory."""
    digest.update(type(leaf).__qualname__.encode())
    if isinstance(leaf, DataLoader):
        known = (leaf.batch_size, leaf.drop_last, type(leaf.sampler).__name__, type(leaf.dataset).__name__)
        digest.update(repr(known).encode())
        digest.update(str(len(leaf.dataset) if hasattr(leaf.dataset, "__len__") else None).encode())
        _add_dataset(digest, leaf.dataset)
    elif isinstance(leaf, TensorDataset):
        for tensor in leaf.tensors:
            _add_leaf(digest, tensor)
    else:
        parts = [leaf.dataset] if isinstance(leaf, Subset) else list(leaf.datasets)
        if isinstance(leaf, Subset):
            _add_array(digest, np.asarray(leaf.indices))
        for part in parts:
            _add_dataset(digest, part)


def _add_dataset(digest: Any, dataset: Any) -> None:
    if isinstance(dataset, (TensorDataset, Subset, ConcatDataset)):
        _add_loader(digest, dataset)
        return
    digest.update(type(dataset).__qualname__.encode())
    readings = [_items_digest(dataset, seed) for seed in range(2)]
    if readings[0] == readings[1]:
        digest.update(readings[0])


def _items_digest(dataset: Any, seed: int) -> bytes:
    """Of evenly spaced items of a dataset; empty where they cannot be read by their indices."""
    digest = hashlib.sha256()
    if isinstance(dataset, IterableDataset):
        return b""
    with preserved_random_states(seed):
        try:
            rows = np.unique(np.linspace(0, max(len(dataset) - 1, 0), _ITEMS).astype(np.int64))
            for row in rows.tolist():
                for leaf in tree_leaves(dataset[row]):
                    _add_leaf(digest, np.asarray(leaf) if hasattr(leaf, "__array_interface__") else leaf)
        except Exception:  # keys that are no integers, or files that are missing
            return b""
    return digest.digest()


def _read_rows(stored: Any) -> Iterator[Any]:
    """Evenly spaced rows of data that are indexed; nothing where they are others at each reading."""
    rows = np.unique(np.linspace(0, max(len(stored) - 1, 0), _READ_ROWS).astype(np.int64))
    try:
        first, again = (np.asarray(stored[rows]) for _ in range(2))
    except Exception:  # what cannot be read so is no data by row; the model is compared by what it makes of it
        return
    if first.dtype == again.dtype and first.tobytes() == again.tobytes():
        yield first
