# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The one place that knows which ArviZ is installed: 0.2x with ``InferenceData``, or 1.x with xarray's ``DataTree``.

Takes arrays and no tensors, so that it runs where neither torch nor Pyro is.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyro_apd.runtime.optional_packages import require

# Groups whose arrays are not by chain and draw.
_DATA_GROUPS = ("observed_data", "constant_data")


class Variable(NamedTuple):
    """An array with names for its dimensions.

    :ivar values: ``(chain, draw, ...)`` in all but the data groups.
    :ivar tuple dims: names of the dimensions after chain and draw.
    :ivar coords: labels by name: the dimension they belong to, and one label for each of its places. Several may
        belong to one dimension.
    """

    values: np.ndarray
    dims: tuple[str, ...]
    coords: Mapping[str, tuple[str, Sequence[Any]]] = {}


def import_arviz() -> Any:
    """Imports ArviZ without its daily message."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return require("arviz", purpose="An export to ArviZ")


def is_datatree(arviz: Any) -> bool:
    """Whether this ArviZ's container is xarray's ``DataTree``."""
    return int(arviz.__version__.split(".")[0]) >= 1


def build(groups: Mapping[str, Mapping[str, Variable | np.ndarray]], attrs: Mapping[str, Mapping[str, Any]]) -> Any:
    """The container of named groups of arrays.

    :param groups: arrays by name, by group; groups without any are left out. Dimensions of a plain array are called
        ``{name}_dim_0`` and so on, and numbered.
    :param attrs: attributes by group; those of ``"/"`` belong to the whole.
    :raises ValueError: if a :class:`Variable` has not one name for each dimension.
    """
    import xarray

    arviz = import_arviz()
    datasets = {
        group: _dataset(arrays, group not in _DATA_GROUPS, attrs.get(group, {}))
        for group, arrays in groups.items()
        if arrays
    }
    if is_datatree(arviz):
        root = {"/": xarray.Dataset(attrs=dict(attrs.get("/", {})))}
        return xarray.DataTree.from_dict({**root, **{f"/{group}": data for group, data in datasets.items()}})
    with warnings.catch_warnings():
        # Groups beyond ArviZ's schema are allowed, and warned of.
        warnings.simplefilter("ignore", UserWarning)
        return arviz.InferenceData(attrs=dict(attrs.get("/", {})), **datasets)


def _dataset(arrays: Mapping[str, Variable | np.ndarray], by_draw: bool, attrs: Mapping[str, Any]) -> Any:
    import xarray

    leading = ("chain", "draw") if by_draw else ()
    variables: dict[str, Any] = {}
    coords: dict[str, Any] = {}
    for name, given in arrays.items():
        rest = 0 if isinstance(given, Variable) else np.ndim(given) - len(leading)
        variable = (
            given if isinstance(given, Variable) else Variable(given, tuple(f"{name}_dim_{i}" for i in range(rest)))
        )
        dims = (*leading, *variable.dims)
        if len(dims) != variable.values.ndim:
            raise ValueError(
                f"'{name}' has {variable.values.ndim} dimensions, but the names {dims}; give one name for each."
            )
        variables[name] = (dims, variable.values)
        for dim, size in zip(dims, variable.values.shape, strict=True):
            coords.setdefault(dim, (dim, np.arange(size)))
        coords |= {label: (dim, np.asarray(values)) for label, (dim, values) in variable.coords.items()}
    return xarray.Dataset(variables, coords, dict(attrs))


def write(idata: Any, path: str | os.PathLike[str]) -> None:
    """Writes NetCDF through ``h5netcdf``, uncompressed: weights are noise, which hardly compresses."""
    if is_datatree(import_arviz()):
        idata.to_netcdf(path, engine="h5netcdf")
    else:
        idata.to_netcdf(str(path), compress=False, engine="h5netcdf")


def read(path: str | os.PathLike[str]) -> Any:
    """What :func:`write` wrote, in memory.

    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it is no NetCDF file that ArviZ can read.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"There is no file '{path}'; pass the chains.nc that save_netcdf(to_arviz(mcmc)) wrote."
        )
    arviz = import_arviz()
    try:
        return arviz.from_netcdf(path) if is_datatree(arviz) else arviz.from_netcdf(str(path), engine="h5netcdf")
    except Exception as error:
        raise ValueError(
            f"'{path}' cannot be read as NetCDF ({error}); pass the chains.nc that save_netcdf(to_arviz(mcmc)) wrote."
        ) from error


def arrays(idata: Any, group: str) -> dict[str, np.ndarray]:
    """Arrays of a group by name; empty where there is no such group."""
    found = idata.groups() if callable(idata.groups) else idata.groups
    if group not in {name.strip("/") for name in found}:
        return {}
    return {str(name): np.asarray(idata[group][name].values) for name in idata[group].data_vars}
