# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Runs of a Pyro model as traces, with errors that name the site, the cause and the fix."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor

from pyro_apd.data.arguments import drawn_latents, explaining_errors
from pyro_apd.data.minibatch import Call
from pyro_apd.errors import DataError, ModelError
from pyro_apd.models.layout import is_subsample
from pyro_apd.models.observations import FloatLabels
from pyro_apd.runtime.global_state import preserved_param_store
from pyro_apd.runtime.trees import tree_leaves

logger = logging.getLogger("pyro_apd")

#: A site of a trace, as Pyro stores it.
Site = Mapping[str, Any]


# Draws from the prior that are tried as a start.
_NUM_DRAWS = 10
# Sites whose values are given to the run of a model in this thread.
_GIVEN: ContextVar[frozenset[str]] = ContextVar("_GIVEN", default=frozenset())


@contextmanager
def _given(values: Collection[str]) -> Iterator[None]:
    token = _GIVEN.set(frozenset(values))
    try:
        yield
    finally:
        _GIVEN.reset(token)


class StartMessenger(InitMessenger):
    """As Pyro's InitMessenger, by which a model starts where an ``init_strategy`` says, but in :func:`run_model` it
    leaves sites alone whose values are given there: a strategy would draw random numbers for nothing."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in _GIVEN.get():
            super()._pyro_sample(msg)


def run_model(model: Callable[..., Any], call: Call, values: Mapping[str, Tensor] | None = None) -> poutine.Trace:
    """Traces ``model`` on ``call``, with the latents set to the constrained ``values`` where given.

    :raises ModelError: if a prior cannot be drawn from, or the model fails because of its plates.
    :raises DataError: if the model fails because of its data.
    """
    given = {**(values or {}), **call.indices}
    tracer = poutine.trace(poutine.condition(model, given))
    with preserved_param_store(), poutine.block(), FloatLabels(), _given(given):
        try:
            with explaining_errors(call.args, call.kwargs, lambda: drawn_latents(tracer.msngr.trace)):
                return tracer.get_trace(*call.args, **call.kwargs)
        except NotImplementedError as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ModelError(
                f"A site's prior cannot be drawn from ({reason}), so the chain has no start. Give the driver "
                "initial_params=, or the kernel init_strategy=pyro.infer.autoguide.init_to_value(values={...}), with a "
                "value for that site."
            ) from error
        except (DataError, ModelError):
            raise
        except ZeroDivisionError as error:
            raise ModelError(
                f"The model fails on a batch: {error}. A plate of some of its rows, such as pyro.plate('data', "
                "int(keep.sum())), may have none, and its size does not follow the number of rows. Leave rows out "
                "before the run, or keep the plate over all rows and put pyro.poutine.mask(mask=keep) inside it."
            ) from error
        except (RuntimeError, ValueError, IndexError) as error:
            with _keeping_first_error():
                _raise_explanation(error, tracer.msngr.trace, _row_counts(call))
            raise


def run_from_prior(
    model: Callable[..., Any], call: Call, run: Callable[[Callable[..., Any], Call], poutine.Trace] = run_model
) -> poutine.Trace:
    """A run with drawn latents; drawn again, a few times, where they give a likelihood parameters that it cannot have.

    A draw from a wide prior may be so far out that a probability rounds to 1.

    :param run: runs the model on a call.
    :raises DataError: as :func:`run_model`, if it fails each time.
    """
    for _ in range(_NUM_DRAWS - 1):
        try:
            return run(model, call)
        except DataError as error:
            if "to satisfy the constraint" not in str(error):
                raise
    return run(model, call)


def subsampled_plates(trace: poutine.Trace) -> dict[str, tuple[int, int]]:
    """``(size, subsample_size)`` of the plates in a trace that draw fewer indices than their size."""
    plates = {}
    for name, site in trace.iter_stochastic_nodes():
        if is_subsample(site) and len(site["value"]) < site["fn"].size:
            plates[name] = (int(site["fn"].size), len(site["value"]))
    return plates


def observed_sites(trace: poutine.Trace) -> dict[str, Site]:
    """Sites that score data: the observed ones, except ``pyro.deterministic``, which scores nothing."""
    sites = {name: trace.nodes[name] for name in trace.observation_nodes}
    return {
        name: site for name, site in sites.items() if not (is_subsample(site) or site["infer"].get("_deterministic"))
    }


def check_latents(trace: poutine.Trace, names: Collection[str]) -> None:
    """Raises ModelError if a run whose latents ``names`` were given has others, or lacks one."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site["is_observed"] and not is_subsample(site):
            raise ModelError(_other_latent_message(name, "is drawn in one run of the model and not in another"))
    for name in names:
        if name not in trace.nodes:
            raise ModelError(_other_latent_message(name, "is missing in a run of the model"))


def check_observed(trace: poutine.Trace, latents: Collection[str], known: Collection[str]) -> None:
    """Raises ModelError if a run has an observed site that is not ``known``: nobody has seen how it is scaled."""
    for name in observed_sites(trace):
        if name not in known and name not in latents:
            raise ModelError(
                f"Observed site '{name}' appears in some batches only, so that it is not known how to scale it by N/B. "
                "Observe it in every run, with pyro.poutine.mask for the rows that it is not about."
            )


def _other_latent_message(name: str, what: str) -> str:
    return (
        f"Latent site '{name}' {what}: the sites depend on the values of other latents, on random numbers or on the "
        "rows of the batch. A chain has one set of latents: draw all of them in every run, and choose between them "
        "with torch.where."
    )


def check_densities(trace: poutine.Trace) -> None:
    """Raises if a site of ``trace`` has no finite log-density, naming it."""
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or is_subsample(site):
            continue
        try:
            log_prob = site["fn"].log_prob(site["value"])
        except (ValueError, IndexError, RuntimeError) as error:
            raise DataError(
                f"Site '{name}' cannot score its values (shape {tuple(site['value'].shape)}, dtype "
                f"{site['value'].dtype}): {str(error)[:300]}. {_advice_on_values(site)}"
            ) from error
        if not bool(torch.isfinite(scale_and_mask(torch.as_tensor(log_prob), 1.0, site["mask"])).all()):
            raise DataError(
                f"Site '{name}' has a log-density that is not finite at the starting point. Check the data for values "
                "outside the likelihood's support, or give initial_params= where the density is positive."
            )


def _advice_on_values(site: Site) -> str:
    fn, value = site["fn"], site["value"]
    if isinstance(fn, torch.distributions.Categorical) and value.dim() == len(fn.batch_shape) + 1:
        return "Categorical takes class labels, not one row of 0 and 1 for each: y.argmax(-1), or OneHotCategorical."
    if site["mask"] is not None:
        return (
            "A value that is masked is scored all the same, and then left out: give it one inside the support, such "
            "as y.clamp(min=0), beside the mask."
        )
    return (
        "Check labels and targets against the likelihood: as many rows as inputs and as the plate, "
        "pyro.plate('data', len(x)), and class labels are integers from 0 to K-1."
    )


def _raise_explanation(error: Exception, trace: poutine.Trace, num_rows: Collection[int]) -> None:
    """Raises an error that explains ``error`` where the trace of the part of the model that ran shows the cause.

    :param num_rows: leading dimensions of the model's arguments.
    """
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or is_subsample(site):
            continue
        plates = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
        if plates:
            raise ModelError(
                f"Site '{name}' is drawn inside plate '{plates[0].name}', once for each of its {plates[0].size} rows, "
                f"and the model then failed: {str(error).splitlines()[0]}. Call the network (or read its weights) "
                f"before `with pyro.plate('{plates[0].name}', ...)`, so that one draw serves all rows."
            ) from error
    subsampling = list(subsampled_plates(trace))
    if isinstance(error, IndexError) and subsampling:
        raise ModelError(
            f"Plate '{subsampling[0]}' draws indices beyond the rows that the model is given ({error}). It expects the "
            "full data: pass them to mcmc.run as they are, without batch_size= or a loader."
        ) from error
    message = str(error)
    mismatch = re.search(r"mismatch inside plate\('(.*)'\) at site (\S+) dim -1, (\d+) vs (\d+)", message)
    if mismatch and int(mismatch[3]) in num_rows:
        raise ModelError(
            f"Site '{mismatch[2]}' has {mismatch[4]} values in its last dimension, inside plate '{mismatch[1]}' of "
            f"{mismatch[3]} rows. Several outputs for each row belong to one event: give the distribution .to_event(1) "
            "(dist.Normal(f, 1.0).to_event(1)); for a column of one output, f.squeeze(-1)."
        ) from error
    if "mismatch inside plate" in message:
        raise ModelError(
            f"The model fails on the rows it is given: {message.splitlines()[0]}. With batch_size= or a loader the "
            "model sees B rows at a time: size the data plate by its input, pyro.plate('data', len(x)), or let the "
            "plate subsample by itself (subsample_size=B, full data to mcmc.run) and drop batch_size=."
        ) from error
    if "within support" in message or "to satisfy the constraint" in message:
        raise DataError(f"The model rejects its data or parameters: {message}") from error


def _row_counts(call: Call) -> set[int]:
    tensors = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
    return {leaf.shape[0] for leaf in tensors if leaf.dim() > 0}


@contextmanager
def _keeping_first_error() -> Iterator[None]:
    """A failure to explain an error must not hide that error."""
    try:
        yield
    except (ModelError, DataError):
        raise
    except Exception as failure:
        logger.debug("No explanation found: %s", failure)
