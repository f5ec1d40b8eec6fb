# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""From a model and the arguments of a run to its potential: all that is checked before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro.poutine import Trace, runtime
from pyro.poutine.messenger import unwrap
from torch import Tensor

from pyro_apd.data.arguments import named_tensors, not_finite
from pyro_apd.data.loader import is_loader
from pyro_apd.data.minibatch import Call, MinibatchSource, PlateSubsample
from pyro_apd.data.sources import check_full_batches, check_stated_number, model_device, open_source
from pyro_apd.errors import DataError, ModelError
from pyro_apd.models.bnn import BNN
from pyro_apd.models.last_layer import refuse_probabilities
from pyro_apd.models.observations import GivenRows, has_missing_targets, without_missing_targets
from pyro_apd.models.potential import Inputs, Potential
from pyro_apd.models.repeatability import refuse_writes, watched_modules
from pyro_apd.models.shapes import refuse_outer_products
from pyro_apd.models.shared_features import with_features
from pyro_apd.models.structure import examine, refuse_missing_sites
from pyro_apd.models.supports import checked_rows, first_run
from pyro_apd.models.tracing import check_densities, run_from_prior, run_model, subsampled_plates
from pyro_apd.runtime.global_state import seeded
from pyro_apd.runtime.threads import one_thread

# Runs in which a plate has the same rows, if the model gives them to it and does not draw them.
_NUM_DRAWS = 3
# Handlers that change no density. Pyro shows the active ones in a private list; where that is gone, none are seen.
_HANDLERS_WITHOUT_EFFECT = ("BlockMessenger", "TraceMessenger")


@one_thread()
def build_potential(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    batch_size: int | None = None,
    num_data: int | None = None,
    replacement: bool = False,
    generator: torch.Generator | None = None,
    capture: bool = True,
    seed: int | None = None,
) -> tuple[Potential, dict[str, Tensor]]:
    """The potential of ``model`` on the arguments of a run, in any of the three styles of mini-batches.

    :param args: the model's arguments, or one iterable of batches.
    :param kwargs: its keyword arguments.
    :param int batch_size: rows per batch, for a model written for the full data.
    :param int num_data: size of the full data, where ``args`` does not show it.
    :param bool replacement: draw the rows of a batch independently, rather than in epochs.
    :param generator: of the first batch; by default one with seed 0.
    :param bool capture: whether to try the captured graph; otherwise the model is traced at every step.
    :param int seed: of the draw of the latents; by default it comes from the global generator.
    :returns: the potential, and one draw of the latents from the prior (constrained), to start from.
    :raises ModelError: if the scaling of a likelihood cannot be established; the message says how to fix the model.
    :raises DataError: if a row of the data is outside the likelihood's support, or has NaN or infinite entries that the
        model does not mask.
    :raises ValueError: if ``batch_size`` or ``num_data`` does not fit the data, or ``replacement`` the source.
    """
    _refuse_handlers()
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    args, kwargs, missing = _with_features(model, args, kwargs, num_data)
    source, inputs = open_source(
        args,
        kwargs,
        batch_size=batch_size,
        num_data=num_data,
        replacement=replacement,
        device=model_device(model, kwargs),
        generator=generator,
    )
    example = source.bind(inputs)
    model = model if source.is_full else without_missing_targets(model)
    missing = missing or not_finite(example.args, example.kwargs)

    def first_trace() -> Trace:
        return first_run(model, source, inputs, lambda call: run_from_prior(model, call, _first_trace), seed)

    try:
        trace = first_trace()
        if source.is_full:
            source, inputs = _of_full_data(source, inputs, trace, replacement, generator)
            if num_data is not None:
                check_stated_number(num_data, source, args, kwargs)
            if source.plates:
                _refuse_fixed_rows(model, example)
                if has_missing_targets(trace):
                    model = without_missing_targets(model)
                    trace = first_trace()
        refuse_missing_sites(trace, (args, dict(kwargs)))
        refuse_outer_products(trace, (example.args, example.kwargs))
        _check_last_layer(model, example)
        # Pyro's validation refuses values outside a support that are masked, too; the rows are checked without it.
        with pyro.validation_enabled(False), checked_rows(model, source, inputs, trace, runs_all=missing is not None):
            structure = examine(model, source, inputs, trace)
        potential = Potential(model, source, structure, example, capture=capture)
        if missing is not None:
            batches = [inputs, *_batches_not_finite(source, inputs, args, kwargs)]
            if not all(potential.is_finite_at_start(batch) for batch in batches):
                raise missing
    except Exception as error:
        if missing is None or error is missing:
            raise
        raise missing from error
    potential.count_operations(structure.start)
    source.start(generator)  # the batch that was examined belongs to no epoch
    return potential, structure.start


def checked_model(model: Any) -> Callable[..., Any]:
    """A Pyro model as it is.

    :raises ValueError: if it is not callable, or a class.
    """
    if not callable(model):
        raise ValueError(f"model={model!r} must be a Pyro model, that is a callable; got {type(model).__name__}.")
    if isinstance(model, type):
        raise ValueError(f"model={model.__name__} is a class; give an instance of it, such as {model.__name__}().")
    checked: Callable[..., Any] = model
    return checked


def _with_features(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], num_data: int | None
) -> tuple[tuple[Any, ...], Mapping[str, Any], DataError | None]:
    """The arguments, with features in place of inputs where the model has them, and what is not finite in them."""
    missing = not_finite(args, kwargs)
    if missing is None and not is_loader(args, num_data):
        args, kwargs = with_features(model, args, kwargs)
    return args, kwargs, missing


def _batches_not_finite(
    source: MinibatchSource, inputs: Inputs, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[Inputs]:
    """Batches of rows in which an argument in memory is NaN or infinite."""
    for value in named_tensors(args, kwargs).values():
        if value.dim() > 0 and len(value) == source.rows_in_memory and value.is_floating_point():
            rows = (~torch.isfinite(value)).reshape(len(value), -1).any(-1).nonzero()[:, 0]
            if len(rows):
                yield (rows[torch.arange(len(inputs[0])) % len(rows)],)


def _first_trace(model: Callable[..., Any], call: Call) -> Trace:
    with watched_modules() as effects:
        trace = run_model(model, call)
    refuse_writes(model, effects)
    check_densities(trace)
    return trace


def _refuse_fixed_rows(model: Callable[..., Any], call: Call) -> None:
    """Refuses plates to which the model gives the same rows in each run."""
    given: list[dict[str, Tensor]] = []
    for number in range(_NUM_DRAWS):
        if given and not given[0]:
            return
        notes = GivenRows()
        with seeded(number):
            run_from_prior(notes(model), call)
        given.append(notes.rows)
    for name, rows in given[0].items():
        if all(name in other and torch.equal(rows, other[name]) for other in given):
            raise ModelError(
                f"Plate '{name}' is given the same {len(rows)} rows in every run, by subsample=, and counts each of "
                "them several times, as if all rows were seen. For mini-batches of all rows write "
                f"subsample_size={len(rows)} in place of subsample=. If only these rows are data, give mcmc.run "
                f"x[rows] and y[rows], and write pyro.plate('{name}', len(x))."
            )


def _check_last_layer(model: Callable[..., Any], call: Call) -> None:
    bnn = unwrap(model)
    if isinstance(bnn, BNN):
        refuse_probabilities(bnn.likelihood, lambda values: bnn.first_outputs(values, call), bnn.network_values)


def _refuse_handlers() -> None:
    """Refuses a run inside handlers: the model runs without them, and its draws would be of another posterior."""
    active = [type(handler).__name__ for handler in getattr(runtime, "_PYRO_STACK", ())]
    others = [name for name in active if name not in _HANDLERS_WITHOUT_EFFECT]
    if others:
        raise ModelError(
            f"The run stands inside handlers of Pyro, {others}, which have no effect on the model in a run: put them "
            "around the model, kernel = SGLD(pyro.poutine.scale(model, scale=0.1), ...), or into its code."
        )


def _of_full_data(
    source: MinibatchSource, inputs: Inputs, trace: Trace, replacement: bool, generator: torch.Generator
) -> tuple[MinibatchSource, Inputs]:
    """The source, and its first batch, of a model that is given all data: its own plates, where they subsample."""
    plates = subsampled_plates(trace)
    if not plates:
        check_full_batches(source.num_data, replacement)
        return source, inputs
    call = source.bind(inputs)
    source = PlateSubsample(call.args, call.kwargs, plates, replacement)
    source.start(generator)
    return source, source.draw()
