# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Chain and generator side by side, for ArviZ.

Groups that :func:`to_arviz` makes:

* ``posterior``: the chain's draws, ``(chain, draw, ...)`` a site. Dimensions of a layer's ``weight`` and ``bias``
  are ``{layer}_unit`` and ``{layer}_input``, of other sites ``{site}_dim_0`` and so on;
* ``posterior_apd``: the generator's, as one chain. They are independent, so ``draw`` has no order. Without a chain
  ``posterior`` holds the same draws (and the same memory), since that is where ArviZ's functions look;
* ``sample_stats``: ``diverging``, ``excursion`` (draws that a chain made outside of what its own history allows, see
  :mod:`pyro_apd.kernels.adaptation.excursions`), and what the kernel offers a draw (``potential``, ``grad_norm``,
  ``step_size``);
* ``posterior_predictive``, ``log_likelihood`` (nats, a column for each observation): under all draws, where model
  and data are known. Those of the generator end in ``_apd``;
* ``observed_data``: observed sites. ``prior``: draws of it, where ``prior`` says how many.

Attributes of the whole are versions and settings as JSON; ``posterior`` says what made it, ``posterior_apd`` holds
the generator's metadata. Where chains diverged, ``posterior`` holds the others, and its attributes ``missing_chains``
and ``diverged_chains`` are lists of their numbers, as JSON.

Generator draws are a group of their own and never a further chain of ``posterior``: the R-hat of the two together
neither accepts a good generator nor finds a bad one.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_apd._version import __version__
from pyro_apd.chains.summary import sampler_summary
from pyro_apd.diagnostics.arviz_export import compat
from pyro_apd.diagnostics.arviz_export.predictions import ModelGroups, attempt
from pyro_apd.diagnostics.arviz_export.variables import Selection, Variables, function_probe
from pyro_apd.diagnostics.comparison.evaluation import Inputs, check_sampled_model, find_inputs, model_of
from pyro_apd.diagnostics.draws import draw_shapes, kernel_settings
from pyro_apd.predictive.chain_draws import ChainDraws
from pyro_apd.predictive.draws import ChainsLike, PosteriorLike, Values, read_chains, read_draws
from pyro_apd.runtime.checks import integer
from pyro_apd.runtime.files import atomic_write
from pyro_apd.runtime.seeds import checked_seed

_LOG = logging.getLogger("pyro_apd")


def to_arviz(
    mcmc: ChainsLike | None = None,
    posterior: PosteriorLike | None = None,
    model: Callable[..., Any] | None = None,
    x: Any = None,
    y: Tensor | None = None,
    *,
    num_samples: int | None = None,
    var_names: Sequence[str] | None = None,
    max_parameters: int | None = None,
    projections: int = 0,
    functions: int = 0,
    posterior_predictive: bool | None = None,
    log_likelihood: bool | None = None,
    prior: int = 0,
    seed: int | None = None,
    group_by_chain: bool | None = None,
) -> Any:
    """An ArviZ container of the chain's draws, the generator's, or both.

    ``InferenceData`` where ArviZ 0.2x is installed, xarray's ``DataTree`` with 1.x; groups are described in
    :mod:`pyro_apd.diagnostics.arviz_export.export`.

    Of a large network ask for less than all weights, of which ArviZ takes ten milliseconds each:
    :func:`~pyro_apd.diagnostics.mixing.convergence` has the statistics of all of them in a tenth of the time.

    :param mcmc: a :class:`pyro.infer.MCMC` after ``run``, with any kernel; or a dict of draws.
    :param posterior: a :class:`~pyro_apd.posterior.posterior.DistilledPosterior`; or a dict of draws ``(S, ...)``.
    :param model: the Pyro model; default that of the kernel.
    :param x: inputs of the predictions, a tensor or a tuple of arguments; default the arguments of ``mcmc.run``, where
        these are the model's and no plate subsamples.
    :param Tensor y: targets of ``x``, one per datum.
    :param int num_samples: generator draws; default as many as a chain has, or the generator's own number.
    :param var_names: sites to keep; default all.
    :param int max_parameters: if there are more weights than this, keep as many at even distances, as one variable
        ``parameters`` whose dimension ``parameter`` is labelled by name, ``site``, ``layer`` and ``unit``.
    :param int projections: also a variable ``projections``: standardised weights on so many random directions.
    :param int functions: also a variable ``functions``: predictions on so many inputs, which are identified where
        weights are not.
    :param bool posterior_predictive: whether to make that group; default where it has up to ten million numbers.
    :param bool log_likelihood: whether to make that group; default likewise.
    :param int prior: draws from the prior.
    :param int seed: for the generator's draws, predictions and directions; None takes torch's global generator.
    :param bool group_by_chain: whether a dict ``mcmc`` is ``(C, S, ...)``; default as ``posterior``'s shapes say.
    :raises ValueError: if both are None, there are no draws, a name is unknown, a number is out of range, or a group
        is asked for whose model or data are not known.
    :raises TypeError: if an argument is of a kind that holds no draws.
    :raises ArtifactError: if the model has other frozen weights than the one that was sampled or distilled.
    """
    if mcmc is None and posterior is None:
        raise ValueError("to_arviz needs `mcmc`, `posterior` or both; got neither.")
    prior = integer("prior", prior, at_least=0, hint="0 for none, or how many draws are wanted.")
    num_samples = None if num_samples is None else integer("num_samples", num_samples)
    seed = checked_seed(seed)
    chain = None if mcmc is None else read_chains(mcmc, shapes=draw_shapes(posterior), group_by_chain=group_by_chain)
    sets, model = _sets(chain, posterior, num_samples, seed), model_of(mcmc, model)
    inputs = find_inputs(mcmc, model, x, y, None)[0]
    first = {name: value[0] for name, value in next(iter(sets.values())).items()}
    check_sampled_model((mcmc, posterior), model, first, inputs)
    asked = {"posterior_predictive": posterior_predictive, "log_likelihood": log_likelihood, "prior": prior or None}
    groups = _groups(sets, Selection(var_names, max_parameters, projections, functions), model, inputs, asked, seed)
    if chain is not None:
        groups["sample_stats"] = sample_stats(mcmc, chain)
    return compat.build(groups, _attributes(mcmc, chain, posterior))


def save_netcdf(idata: Any, path: str | os.PathLike[str]) -> Path:
    """Writes what :func:`to_arviz` made as NetCDF, from which ``arviz.from_netcdf(path)`` gets it back.

    Uncompressed, through ``h5netcdf``: weights hardly compress, and trying takes a hundred times as long. The file
    appears whole or not at all.

    :raises FileNotFoundError: if the folder does not exist.
    """
    with atomic_write(path) as temporary:
        compat.write(idata, temporary)
    return Path(path)


def chain_diagnostics(mcmc: object) -> list[Mapping[str, Any]]:
    """What the kernel's ``diagnostics()`` gave, a dict for each chain; empty where there is nothing.

    ``mcmc.diagnostics()`` would first compute R-hat and effective sizes of every weight (half a minute for 80,000), so
    the driver's own record is read; the public way is the fallback, for drivers that keep none.
    """
    record = getattr(mcmc, "_diagnostics", None)
    if isinstance(record, (list, tuple)):
        return [chain if isinstance(chain, Mapping) else {} for chain in record]
    diagnostics = getattr(mcmc, "diagnostics", None)
    if not callable(diagnostics):
        return []
    by_name = {name: value for name, value in diagnostics().items() if isinstance(value, Mapping)}
    count = int(getattr(mcmc, "num_chains", 1))
    labels = [f"chain {i}" for i in range(count)]
    return [{name: value[label] for name, value in by_name.items() if label in value} for label in labels]


def sample_stats(mcmc: object, chain: ChainDraws) -> dict[str, np.ndarray]:
    """``diverging``, ``excursion`` and all per-draw statistics that every chain's kernel recorded, each ``(C, S)``."""
    records = chain_diagnostics(mcmc)
    numbers = getattr(mcmc, "chains", range(len(records)))
    records = [record for number, record in zip(numbers, records, strict=False) if number not in chain.missing]
    if len(records) != chain.num_chains:
        return {}
    stats: dict[str, np.ndarray] = {}
    for name, of_kernel in (("diverging", "divergences"), ("excursion", "excursions")):
        if all(of_kernel in record for record in records):
            stats[name] = _marks([record[of_kernel] for record in records], chain.num_draws)
    for name in records[0]:
        values = [record.get(name) for record in records]
        if all(isinstance(value, Tensor) and value.dim() == 1 and len(value) >= chain.num_draws for value in values):
            # A chain may be longer than the others, where one of them diverged.
            rows = [value[: chain.num_draws].detach().cpu().numpy() for value in values]  # type: ignore[index]
            stats[name] = np.stack(rows)
    return stats


def _marks(draws_C: Sequence[Iterable[int]], num_draws: int) -> np.ndarray:
    """``(C, S)``, True for the draws whose numbers are given by chain."""
    marks_CS = np.zeros((len(draws_C), num_draws), dtype=bool)
    for row, draws in zip(marks_CS, draws_C, strict=True):
        row[[int(i) for i in draws if 0 <= int(i) < num_draws]] = True
    return marks_CS


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    arviz = compat.import_arviz()
    return {
        "pyro_apd": __version__,
        "pyro": pyro.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "arviz": arviz.__version__,
    }


def _sets(
    chain: ChainDraws | None, posterior: PosteriorLike | None, num_samples: int | None, seed: int | None
) -> dict[str, Values]:
    """Draws ``(C, S, ...)`` by the suffix of their groups."""
    sets: dict[str, Values] = {} if chain is None else {"": chain.values}
    if posterior is not None:
        num_samples = chain.num_draws if num_samples is None and chain is not None else num_samples
        drawn = read_draws(posterior, num_samples, seed=seed)
        sets["_apd"] = {name: value.unsqueeze(0) for name, value in drawn.items()}
    return sets


def _groups(
    sets: Mapping[str, Values],
    selection: Selection,
    model: Callable[..., Any] | None,
    inputs: Inputs | None,
    asked: Mapping[str, Any],
    seed: int | None,
) -> dict[str, Mapping[str, Any]]:
    """All groups that come of draws, by the suffix of their names: none for the chain's, ``_apd`` for others."""
    reference = next(iter(sets.values()))
    variables = Variables(selection, reference, function_probe(selection, model, inputs), seed)
    groups: dict[str, Mapping[str, Any]] = {
        f"posterior{suffix}": variables(draws, "posterior" if suffix else "mcmc") for suffix, draws in sets.items()
    }
    predictions = _model_groups(model, inputs, reference, asked, seed)
    if predictions is not None:
        groups |= _of_model(predictions, sets, asked)
        if asked["prior"]:
            groups["prior"] = variables(predictions.prior(asked["prior"]), "prior")
    # Without a chain, the generator's are where ArviZ looks.
    for group in [group for group in groups if group.endswith("_apd")]:
        groups.setdefault(group.removesuffix("_apd"), groups[group])
    return groups


def _model_groups(
    model: Callable[..., Any] | None,
    inputs: Inputs | None,
    reference: Values,
    asked: Mapping[str, Any],
    seed: int | None,
) -> ModelGroups | None:
    """What makes the groups that need a model; None where it cannot, unless one was asked for."""
    wanted = [name for name, value in asked.items() if value]
    if all(value is False for value in asked.values()):
        return None
    if model is None or inputs is None:
        if wanted:
            raise ValueError(
                f"`{wanted[0]}` was asked for, but there is no model or no input: pass `model`, `x` and `y`."
            )
        return None
    draw = {name: value[0, 0] for name, value in reference.items()}
    try:
        return ModelGroups(model, inputs.labelled or inputs.args, inputs.kwargs, draw, seed)
    except Exception as error:
        if wanted:
            raise
        _LOG.warning("No observed_data or predictions: the model failed on its arguments (%s).", error)
        return None


def _of_model(
    predictions: ModelGroups, sets: Mapping[str, Values], asked: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    if predictions.is_subsampled:
        # Each run of such a model sees other rows, so that draws would not be of the same observations.
        if asked["posterior_predictive"]:
            raise ValueError(
                "`posterior_predictive` was asked for, but a plate of the model subsamples its data; pass the model "
                "rows without a subsample, as `x` and `y`."
            )
        return {}
    if asked["log_likelihood"] and not predictions.has_observations:
        raise ValueError("`log_likelihood` was asked for, but the model has no observations here: pass `x` and `y`.")
    groups: dict[str, dict[str, Any]] = {"observed_data": predictions.observed()}
    for suffix, draws in sets.items():
        chains, steps = next(iter(draws.values())).shape[:2]
        makers = {"posterior_predictive": predictions.predictions}
        if predictions.has_observations:
            makers["log_likelihood"] = predictions.log_likelihood
        for name, make in makers.items():
            if asked[name]:
                groups[f"{name}{suffix}"] = make(draws)
            elif asked[name] is None and predictions.is_large(chains * steps):
                _LOG.info("No %s%s: it would be large; %s=True makes it.", name, suffix, name)
            elif asked[name] is None:
                groups[f"{name}{suffix}"] = attempt(f"{name}{suffix}", partial(make, draws))
    return groups


def _attributes(mcmc: object, chain: ChainDraws | None, posterior: object) -> dict[str, dict[str, Any]]:
    settings = json.dumps(kernel_settings(mcmc), sort_keys=True)
    generator = {"source": "generator", "metadata": _metadata(posterior)}
    of_chain = generator
    if chain is not None:
        summary = json.dumps(sampler_summary(mcmc), sort_keys=True)
        of_chain = {"source": chain.name, "kernel_settings": settings, "sampler": summary}
    if chain is not None and chain.missing + chain.diverged:
        of_chain |= {"missing_chains": json.dumps(chain.missing), "diverged_chains": json.dumps(chain.diverged)}
    return {
        "/": {"versions": json.dumps(versions(), sort_keys=True), "kernel_settings": settings},
        "posterior": of_chain,
        "posterior_apd": generator,
    }


def _metadata(posterior: object) -> str:
    metadata = getattr(posterior, "metadata", None)
    return json.dumps(metadata if isinstance(metadata, Mapping) else {}, sort_keys=True, default=str)
