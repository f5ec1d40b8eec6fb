# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The one place that knows which ArviZ is installed: 0.2x with ``InferenceData``, or 1.x with xarray's ``DataTree``.

Takes dicts of arrays and no tensors, so that it runs where neither torch nor Pyro is.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

# Those of our groups that ArviZ's schema has.
_STANDARD_GROUPS = ("posterior", "sample_stats", "observed_data")


def import_arviz() -> Any:
    """ArviZ, without the announcement it makes at import once a day."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz
    return arviz


def is_datatree(arviz: Any) -> bool:
    """Whether this ArviZ's container is xarray's ``DataTree``."""
    return int(arviz.__version__.split(".")[0]) >= 1


def build(groups: Mapping[str, Mapping[str, Any]], attrs: Mapping[str, Mapping[str, Any]]) -> Any:
    """The container of named groups of arrays.

    :param groups: arrays by name, by group; ``(chain, draw, ...)`` in all but the data groups. Further dimensions
        are called ``{name}_dim_0`` and so on.
    :param attrs: attributes by group; those of ``"/"`` belong to the whole.
    """
    arviz = import_arviz()
    groups = {group: dict(arrays) for group, arrays in groups.items() if arrays}
    attrs = {group: dict(values) for group, values in attrs.items() if group in groups or group == "/"}
    with warnings.catch_warnings():
        # ArviZ finds it odd that there are more chains than draws.
        warnings.simplefilter("ignore", UserWarning)
        if is_datatree(arviz):
            return arviz.from_dict(groups, attrs=attrs)
        own = {group: arrays for group, arrays in groups.items() if group not in _STANDARD_GROUPS}
        standard = {group: arrays for group, arrays in groups.items() if group in _STANDARD_GROUPS}
        standard_attrs = {f"{group}_attrs": attrs.get(group) for group in standard}
        idata = arviz.from_dict(**standard, attrs=attrs.get("/"), **standard_attrs)
        for group, arrays in own.items():
            idata.add_groups({group: arviz.dict_to_dataset(arrays, attrs=attrs.get(group))})
    return idata


def write(idata: Any, path: str | os.PathLike[str]) -> None:
    """Writes NetCDF through ``h5netcdf``, uncompressed: weights are noise, which hardly compresses."""
    if is_datatree(import_arviz()):
        idata.to_netcdf(path, engine="h5netcdf")
    else:
        idata.to_netcdf(str(path), compress=False, engine="h5netcdf")
