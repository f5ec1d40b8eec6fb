# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Chain and generator side by side, for ArviZ."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_apd import __version__
from pyro_apd.diagnostics import arviz_compat
from pyro_apd.diagnostics.draws import ChainDraws, draw_posterior, draw_shapes, kernel_settings, read_chain
from pyro_apd.diagnostics.files import written_whole
from pyro_apd.layout import is_subsample
from pyro_apd.minibatch import is_loader
from pyro_apd.pyro_state import preserved_param_store, seeded

_LOG = logging.getLogger("pyro_apd")


def to_arviz(
    mcmc: Any = None,
    posterior: Any = None,
    model: Callable[..., Any] | None = None,
    *,
    num_samples: int | None = None,
    var_names: Sequence[str] | None = None,
    seed: int | None = None,
    group_by_chain: bool | None = None,
) -> Any:
    """An ArviZ container of the chain's draws, the generator's, or both.

    ``InferenceData`` where ArviZ 0.2x is installed, xarray's ``DataTree`` with 1.x. Groups:

    * ``posterior``: the chain's draws, dimensions ``chain``, ``draw``, ``{site}_dim_0``, ...;
    * ``posterior_apd``: the generator's, as one chain. They are independent, so ``draw`` has no order. Without a chain
      ``posterior`` holds the same draws (and the same memory), since that is where ArviZ's functions look;
    * ``sample_stats``: ``diverging``, and what the kernel offers a draw (``potential``, ``grad_norm``, ``step_size``);
    * ``observed_data``: observed sites, where the arguments of ``mcmc.run`` are the model's and no plate subsamples.

    Generator draws are a group of their own and never a further chain of ``posterior``: the R-hat of the two together
    neither accepts a good generator nor finds a bad one.

    :param mcmc: a :class:`pyro.infer.MCMC` after ``run``, with any kernel; or a dict of draws.
    :param posterior: a :class:`~pyro_apd.posterior.DistilledPosterior`; or a dict of draws ``(S, ...)``.
    :param model: the Pyro model; default that of the kernel. Only ``observed_data`` needs it.
    :param int num_samples: generator draws; default as many as the chain has a chain, or the generator's own number.
    :param var_names: sites to keep; default all.
    :param int seed: for the generator's draws; None takes torch's global generator.
    :param bool group_by_chain: whether a dict ``mcmc`` is ``(C, S, ...)``; default by the shapes of ``posterior``,
        else no.
    :raises ValueError: if both are None, there are no draws, or a name is unknown.
    :raises TypeError: if an argument is of a kind that holds no draws.
    """
    if mcmc is None and posterior is None:
        raise ValueError("to_arviz needs `mcmc`, `posterior` or both; got neither.")
    groups: dict[str, dict[str, np.ndarray]] = {}
    chain = None
    if mcmc is not None:
        chain = read_chain(mcmc, draw_shapes(posterior), group_by_chain)
        groups["posterior"] = _arrays(_selected(chain.values, var_names, "mcmc"))
    if posterior is not None:
        if num_samples is None and chain is not None:
            num_samples = chain.num_draws
        drawn = _selected(draw_posterior(posterior, num_samples, seed), var_names, "posterior")
        groups["posterior_apd"] = _arrays({name: value.unsqueeze(0) for name, value in drawn.items()})
        groups.setdefault("posterior", groups["posterior_apd"])
    if chain is not None:
        groups["sample_stats"] = sample_stats(mcmc, chain)
        groups["observed_data"] = _observed(mcmc, chain, model)
    return arviz_compat.build(groups, _attributes(mcmc, chain, posterior))


def save_netcdf(idata: Any, path: str | os.PathLike[str]) -> Path:
    """Writes what :func:`to_arviz` made as NetCDF, from which ``arviz.from_netcdf(path)`` gets it back.

    Uncompressed, through ``h5netcdf``: weights hardly compress, and trying takes a hundred times as long. The file
    appears whole or not at all.

    :raises FileNotFoundError: if the folder does not exist.
    """
    with written_whole(path) as temporary:
        arviz_compat.write(idata, temporary)
    return Path(path)


def chain_diagnostics(mcmc: Any) -> list[Mapping[str, Any]]:
    """What the kernel's ``diagnostics()`` gave, a dict for each chain; empty where there is nothing.

    ``mcmc.diagnostics()`` would first compute R-hat and effective sizes of every weight (half a minute for 80,000), so
    the driver's own record is read; the public way is the fallback, for drivers that keep none.
    """
    record = getattr(mcmc, "_diagnostics", None)
    if isinstance(record, (list, tuple)):
        return [chain if isinstance(chain, Mapping) else {} for chain in record]
    if not callable(getattr(mcmc, "diagnostics", None)):
        return []
    by_name = {name: value for name, value in mcmc.diagnostics().items() if isinstance(value, Mapping)}
    count = int(getattr(mcmc, "num_chains", 1))
    labels = [f"chain {i}" for i in range(count)]
    return [{name: value[label] for name, value in by_name.items() if label in value} for label in labels]


def sample_stats(mcmc: Any, chain: ChainDraws) -> dict[str, np.ndarray]:
    """``diverging`` and all per-draw figures that every chain's kernel recorded, each ``(C, S)``."""
    records = chain_diagnostics(mcmc)
    if len(records) != chain.num_chains:
        return {}
    stats: dict[str, np.ndarray] = {}
    if all("divergences" in record for record in records):
        diverging = np.zeros((chain.num_chains, chain.num_draws), dtype=bool)
        for row, record in zip(diverging, records, strict=True):
            row[[int(i) for i in record["divergences"] if 0 <= int(i) < chain.num_draws]] = True
        stats["diverging"] = diverging
    for name in records[0]:
        values = [record.get(name) for record in records]
        if all(isinstance(value, Tensor) and value.shape == (chain.num_draws,) for value in values):
            stats[name] = np.stack([value.detach().cpu().numpy() for value in values])  # type: ignore[union-attr]
    return stats


def versions() -> dict[str, str]:
    """Versions of the packages that figures depend on."""
    arviz = arviz_compat.import_arviz()
    return {
        "pyro_apd": __version__,
        "pyro": pyro.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "arviz": arviz.__version__,
    }


def _selected(values: Mapping[str, Tensor], var_names: Sequence[str] | None, argument: str) -> dict[str, Tensor]:
    if var_names is None:
        return dict(values)
    missing = [name for name in var_names if name not in values]
    if missing:
        raise ValueError(f"`var_names` has {missing}, which `{argument}` lacks; its sites are {sorted(values)}.")
    return {name: values[name] for name in var_names}


def _arrays(values: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    # NumPy has no bfloat16.
    return {n: (v.float() if v.dtype == torch.bfloat16 else v).detach().cpu().numpy() for n, v in values.items()}


def _observed(mcmc: Any, chain: ChainDraws, model: Callable[..., Any] | None) -> dict[str, np.ndarray]:
    """Observed sites of one run of the model on the arguments of ``mcmc.run``."""
    model = model if model is not None else getattr(getattr(mcmc, "kernel", None), "model", None)
    args, kwargs = getattr(mcmc, "_args", None), getattr(mcmc, "_kwargs", None)
    if model is None or args is None or is_loader(args, getattr(mcmc.kernel, "num_data", None)):
        return {}
    draw = {name: value[0, 0] for name, value in chain.values.items()}
    with preserved_param_store(), seeded(0), torch.no_grad():
        try:
            trace = poutine.trace(poutine.condition(model, data=draw)).get_trace(*args, **(kwargs or {}))
        except Exception as error:
            _LOG.warning("No observed_data: the model failed on the arguments of mcmc.run (%s).", error)
            return {}
    sites = [site for site in trace.nodes.values() if site["type"] == "sample" and site["name"] not in draw]
    if any(is_subsample(site) and len(site["value"]) < site["fn"].size for site in sites):
        return {}
    observed = {site["name"]: site["value"] for site in sites if site["is_observed"] and not _is_fixed(site)}
    return {name: value.detach().cpu().numpy() for name, value in observed.items()}


def _is_fixed(site: Mapping[str, Any]) -> bool:
    """Whether a site is a ``pyro.deterministic`` or a ``pyro.factor``, which count as observed."""
    return is_subsample(site) or site["infer"].get("_deterministic", False) or type(site["fn"]).__name__ == "Unit"


def _attributes(mcmc: Any, chain: ChainDraws | None, posterior: Any) -> dict[str, dict[str, Any]]:
    settings = json.dumps(kernel_settings(mcmc), sort_keys=True)
    generator = {"source": "generator", "metadata": _metadata(posterior)}
    return {
        "/": {"versions": json.dumps(versions(), sort_keys=True), "kernel_settings": settings},
        "posterior": {"source": chain.name, "kernel_settings": settings} if chain is not None else generator,
        "posterior_apd": generator,
    }


def _metadata(posterior: Any) -> str:
    metadata = getattr(posterior, "metadata", None)
    return json.dumps(metadata if isinstance(metadata, Mapping) else {}, sort_keys=True, default=str)
