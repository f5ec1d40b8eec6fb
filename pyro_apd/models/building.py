# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""From a model and the arguments of a run to its potential: all that is checked before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_apd.data.arguments import named_tensors, not_finite
from pyro_apd.data.minibatch import Call, MinibatchSource, PlateSubsample
from pyro_apd.data.sources import check_full_batches, check_stated_number, model_device, open_source
from pyro_apd.models.observations import without_missing_targets
from pyro_apd.models.potential import Inputs, Potential
from pyro_apd.models.repeatability import refuse_writes, watched_modules
from pyro_apd.models.shapes import refuse_outer_products
from pyro_apd.models.structure import examine, refuse_missing_sites
from pyro_apd.models.supports import checked_rows, first_run
from pyro_apd.models.tracing import check_densities, run_from_prior, run_model, subsampled_plates
from pyro_apd.runtime.threads import one_thread


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
    generator = torch.Generator().manual_seed(0) if generator is None else generator
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
    if not source.is_full:
        model = without_missing_targets(model)
    missing = not_finite(args, kwargs) or not_finite(example.args, example.kwargs)
    try:
        trace = first_run(model, source, inputs, lambda call: run_from_prior(model, call, _first_trace), seed)
        if source.is_full:
            source, inputs = _of_full_data(source, inputs, trace, replacement, generator)
            if num_data is not None:
                check_stated_number(num_data, source, args, kwargs)
        refuse_missing_sites(trace, (args, dict(kwargs)))
        refuse_outer_products(trace)
        with checked_rows(model, source, inputs, trace, runs_all=missing is not None):
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
    source.start(generator)  # the batch that was examined belongs to no epoch
    return potential, structure.start


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
