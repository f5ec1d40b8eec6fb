# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Establishes, before the first step, what a mini-batch of a model's likelihood is worth; refuses what is unclear.

The potential is U = -log p(theta) - (N/B) sum log p(y_i | theta). Pyro models state N/B in several ways: a subsampled
plate scales by itself, a model written for full data does not, and an observed site may not be about the data at all.
Guessing wrong gives a posterior of the wrong temperature without any error, so each observed site is put to the test:
the model is run on batches of different rows and different sizes, with the same latents, and must answer consistently.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_apd.data.arguments import drawn, explained
from pyro_apd.data.loader import LoaderBatches
from pyro_apd.data.minibatch import Call, MinibatchSource, PlateSubsample, RowSubsample
from pyro_apd.data.row_reader import RowReader
from pyro_apd.errors import DataError, ModelError
from pyro_apd.models.layout import Layout, is_subsample
from pyro_apd.runtime.global_state import preserved_param_store
from pyro_apd.runtime.trees import tree_leaves

logger = logging.getLogger("pyro_apd")

Sites = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Anatomy:
    """What a model is made of, seen from its potential.

    :ivar Layout layout: its latent sites.
    :ivar start: constrained values of the latents in the first run, drawn from the prior.
    :ivar scaled: observed sites of which a batch shows a part, by whether their plate multiplies them by N/B already;
        the kernel does it for the others.
    :ivar pass_through: plates that state N themselves and are fed ready batches; their indices have no effect.
    """

    layout: Layout
    start: dict[str, Tensor]
    scaled: Mapping[str, bool] = field(default_factory=dict)
    pass_through: frozenset[str] = frozenset()


def run_model(model: Callable[..., Any], call: Call, values: Mapping[str, Tensor] | None = None) -> poutine.Trace:
    """Traces ``model`` on ``call``, latents set to the constrained ``values`` where given.

    :raises ModelError: if it fails because something is drawn inside the data plate.
    """
    conditioned = poutine.condition(model, {**(values or {}), **call.indices})
    tracer = poutine.trace(conditioned)
    with poutine.block(), preserved_param_store():
        try:
            with explained(call.args, call.kwargs, lambda: drawn(tracer.msngr.trace)):
                return tracer.get_trace(*call.args, **call.kwargs)
        except NotImplementedError as error:
            raise ModelError(
                f"A site's prior cannot be drawn from ({error}), so the chain has no start. Give the kernel "
                "init_strategy=pyro.infer.autoguide.init_to_value(values={...}) with a value for that site."
            ) from error
        except DataError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            with _no_second_failure():
                _explain(error, tracer.msngr.trace)
            raise


def subsampled_plates(trace: poutine.Trace) -> dict[str, tuple[int, int]]:
    """``(size, subsample_size)`` of the plates in a trace that draw fewer indices than they have."""
    plates = {}
    for name, site in trace.iter_stochastic_nodes():
        if is_subsample(site) and len(site["value"]) < site["fn"].size:
            plates[name] = (int(site["fn"].size), len(site["value"]))
    return plates


def examine(model: Callable[..., Any], source: MinibatchSource, call: Call, trace: poutine.Trace) -> Anatomy:
    """The anatomy of ``model``, of which ``trace`` is a run on ``call``, a batch that ``source`` made.

    :raises ModelError: if a latent is discrete, lies in a subsampled plate, or a scaling cannot be established.
    """
    latents = {name: site for name, site in trace.iter_stochastic_nodes() if not is_subsample(site)}
    _refuse_discrete(latents)
    if trace.param_nodes:
        warnings.warn(
            f"The model has parameters {sorted(trace.param_nodes)} that are not sampled: they stay at their present "
            "values. Give them priors (PyroSample) if they belong to the posterior.",
            stacklevel=2,
        )
    layout = Layout.from_trace(trace)
    start = {name: site["value"].detach() for name, site in latents.items()}
    if isinstance(source, PlateSubsample):
        _check_plates(model, source, call, start, trace)
        return Anatomy(layout, start)
    if not isinstance(source, (RowSubsample, RowReader, LoaderBatches)):
        return Anatomy(layout, start)
    assert source.num_data is not None
    passing = frozenset(subsampled_plates(trace))
    rows = source.batch_size if isinstance(source, (RowSubsample, RowReader)) else _tensors(call)[0].shape[0]
    probe = _RowProbe(model, call, source.num_data, start, rows, isinstance(source, RowSubsample))
    scaled = probe.scaled_sites(source)
    return Anatomy(layout, start, scaled, passing)


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
                f"{site['value'].dtype}): {error}. Check labels and targets against the likelihood: as many rows as "
                "inputs, and class labels are integers from 0 to K-1."
            ) from error
        if site["is_observed"]:
            _refuse_outer_product(name, site, torch.as_tensor(log_prob))
        if not bool(torch.isfinite(torch.as_tensor(log_prob)).all()):
            raise DataError(
                f"Site '{name}' has a log-density that is not finite at the starting point. Check the data for values "
                "outside the likelihood's support, or give initial_params= where the density is positive."
            )


def _refuse_outer_product(name: str, site: Mapping[str, Any], log_prob: Tensor) -> None:
    """Targets ``(N, 1)`` against predictions ``(N,)`` would score every datum by every prediction."""
    fn, shape = site["fn"], tuple(torch.as_tensor(site["value"]).shape)
    data_shape = shape[: len(shape) - fn.event_dim]
    if log_prob.numel() > max(fn.batch_shape.numel(), torch.Size(data_shape).numel()):
        raise DataError(
            f"Observed site '{name}' has values of shape {shape} and a likelihood of shape {tuple(fn.batch_shape)}, "
            f"which broadcast to {tuple(log_prob.shape)}: every datum would be scored by every prediction. Give both "
            "one shape; for a column of targets, y.squeeze(-1)."
        )


def _refuse_discrete(latents: Sites) -> None:
    for name, site in latents.items():
        if site["fn"].has_enumerate_support or site["fn"].support.is_discrete:
            raise ModelError(
                f"Site '{name}' is a discrete latent ({type(site['fn']).__name__}); gradient-based samplers need "
                "continuous latents. Marginalise it, or if it should be data, pass its value with obs= (was the target "
                "given to mcmc.run?)."
            )


def _observed(trace: poutine.Trace) -> dict[str, dict[str, Any]]:
    """Sites that score data: the observed ones, but for ``pyro.deterministic``, which scores nothing."""
    sites = {name: trace.nodes[name] for name in trace.observation_nodes}
    return {
        name: site for name, site in sites.items() if not (is_subsample(site) or site["infer"].get("_deterministic"))
    }


def _explain(error: Exception, trace: poutine.Trace) -> None:
    """Raises the reason behind ``error`` where the part of the model that did run shows it."""
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
    subsampling = [name for name, site in trace.nodes.items() if site["type"] == "sample" and is_subsample(site)]
    if isinstance(error, IndexError) and subsampling:
        raise ModelError(
            f"Plate '{subsampling[0]}' draws indices beyond the rows that the model is given ({error}). It expects the "
            "full data: pass them to mcmc.run as they are, without batch_size= or a loader."
        ) from error
    message = str(error)
    if "mismatch inside plate" in message:
        raise ModelError(
            f"The model fails on the rows it is given: {message.splitlines()[0]}. With batch_size= or a loader the "
            "model sees B rows at a time: size the data plate by its input, pyro.plate('data', len(x)), or let the "
            "plate subsample by itself (subsample_size=B, full data to mcmc.run) and drop batch_size=."
        ) from error
    if "within support" in message or "to satisfy the constraint" in message:
        raise DataError(f"The model rejects its data or parameters: {message}") from error


@contextmanager
def _no_second_failure() -> Iterator[None]:
    """An explanation must never hide the error it explains."""
    try:
        yield
    except (ModelError, DataError):
        raise
    except Exception as failure:
        logger.debug("No explanation found: %s", failure)


def _in_subsample_message(name: str, plate: str) -> str:
    return (
        f"Latent site '{name}' lies inside the subsampled plate '{plate}': it has one value for each datum, and a "
        "mini-batch sees only some of them. If it is a weight, read it (or call the network) before the plate; if it "
        "should be data, pass its value with obs= (was the target given to mcmc.run?); if it is a local latent, "
        "marginalise it or use the full batch."
    )


def _check_plates(
    model: Callable[..., Any], source: PlateSubsample, call: Call, start: dict[str, Tensor], trace: poutine.Trace
) -> None:
    """Style (i): every data-dependent observation must lie in the plate that subsamples it, scaled once."""
    for name in start:
        for frame in trace.nodes[name]["cond_indep_stack"]:
            if frame.name in source.plates:
                raise ModelError(_in_subsample_message(name, frame.name))
    first = run_model(model, call, start)
    other_rows = {
        name: (torch.arange(batch) + (size - batch)).to(call.indices[name].device)
        for name, (size, batch) in source.plates.items()
    }
    second = run_model(model, Call(call.args, call.kwargs, other_rows), start)
    if not any(_differs(site, second.nodes[name]) for name, site in _observed(first).items()):
        raise ModelError(
            f"Plates {sorted(source.plates)} draw a subsample, but no observed site changes with it: every mini-batch "
            "would see the same rows. Give mcmc.run the full data and let the model take its rows with pyro.subsample "
            "or the plate's indices; or feed batches through a DataLoader (with num_data=) or batch_size=."
        )
    for name, site in _observed(first).items():
        ratios = [source.plates[f.name] for f in site["cond_indep_stack"] if f.name in source.plates]
        expected = _product(size / batch for size, batch in ratios)
        if not ratios and _differs(site, second.nodes[name]):
            raise ModelError(
                f"Observed site '{name}' depends on the rows that plate {sorted(source.plates)} selects, but lies "
                "outside it, so its log-likelihood is not scaled by N/B. Move it inside the plate."
            )
        if ratios and _close(float(site["scale"]), expected**2):
            raise ModelError(_twice_message(name, float(site["scale"]), expected))


class _RowProbe:
    """Styles (ii) and (iii): runs a model on batches of ready rows and compares what each observed site answers."""

    def __init__(
        self,
        model: Callable[..., Any],
        call: Call,
        num_data: int,
        start: Mapping[str, Tensor],
        rows: int,
        is_full_known: bool,
    ) -> None:
        self._model, self._call, self._num_data, self._start = model, call, num_data, start
        self._rows, self._is_full_known = rows, is_full_known

    def scaled_sites(self, source: MinibatchSource) -> dict[str, bool]:
        """The observed sites that follow the rows, by whether the model scales them by N/B itself."""
        assert isinstance(source, (RowSubsample, RowReader, LoaderBatches))
        runs = self._row_runs(source) if isinstance(source, RowSubsample) else self._batch_runs(source)
        if runs is None:
            return self._single_row_sites()
        few, (same, _), more, full_scale = runs
        trace_few, rows = few
        trace_more, rows_more = more
        answers = {
            name: self._scales_itself(name, site, same.nodes[name], trace_more.nodes[name], rows, rows_more, full_scale)
            for name, site in _observed(trace_few).items()
        }
        return {name: answer for name, answer in answers.items() if answer is not None}

    def _run(self, call: Call, rows: int) -> poutine.Trace:
        free = run_model(self._model, call)
        for name, value in self._start.items():
            site = free.nodes.get(name)
            frames = site["cond_indep_stack"] if site is not None else ()
            in_plate = next((f.name for f in frames if f.vectorized and f.size == rows), None)
            if site is None or site["value"].shape != value.shape or in_plate is not None:
                raise ModelError(_in_subsample_message(name, in_plate or "over the rows of the data"))
        plates = subsampled_plates(free)
        for name, (size, batch) in plates.items():
            if batch != rows or size != self._num_data:
                raise ModelError(
                    f"Plate '{name}' takes {batch} of {size} rows, but is fed batches of {rows} rows out of "
                    f"{self._num_data}. Either let the model subsample (full data to mcmc.run, no batch_size=), or let "
                    f"the kernel do it: pyro.plate('{name}', len(x)) in the model."
                )
        indices = {name: torch.arange(batch) for name, (_, batch) in plates.items()}
        return run_model(self._model, Call(call.args, call.kwargs, indices), self._start)

    def _row_runs(self, source: RowSubsample) -> Any:
        num_data, rows = self._num_data, source.batch_size
        rows_more = rows + 1 if rows < num_data else rows - 1
        if rows_more == 0:
            return None
        calls = [source.bind((torch.arange(a, b),)) for a, b in ((0, rows), (num_data - rows, num_data))]
        calls += [source.bind((torch.arange(rows_more),)), source.bind((torch.arange(num_data),))]
        traces = [self._run(c, n) for c, n in zip(calls, (rows, rows, rows_more, num_data), strict=True)]
        full_scale = {name: float(site["scale"]) for name, site in _observed(traces[3]).items()}
        return (traces[0], rows), (traces[1], rows), (traces[2], rows_more), full_scale

    def _batch_runs(self, source: RowReader | LoaderBatches) -> Any:
        rows = self._rows
        if rows < 2:
            return None
        half = rows // 2
        spans = ((0, half), (half, 2 * half), (0, half + 1))
        if isinstance(source, RowReader):
            batch = source.draw()
            calls = [source.bind(tuple(tensor[a:b] for tensor in batch)) for a, b in spans]
        else:
            whole = RowSubsample(self._call.args, self._call.kwargs, 1, rows)
            calls = [whole.bind((torch.arange(a, b),)) for a, b in spans]
        traces = [self._run(call, b - a) for call, (a, b) in zip(calls, spans, strict=True)]
        return (traces[0], half), (traces[1], half), (traces[2], half + 1), None

    def _single_row_sites(self) -> dict[str, bool]:
        """With one row there is nothing to compare; only a model that does not scale at all is clear."""
        trace = run_model(self._model, self._call, self._start)
        scales = {name: float(site["scale"]) for name, site in _observed(trace).items()}
        if len(scales) != 1 or set(scales.values()) != {1.0}:
            raise ModelError(
                f"With batches of one row the scaling of sites {scales} cannot be established. Use at least 2 rows."
            )
        return dict.fromkeys(scales, False)

    def _scales_itself(
        self, name: str, few: Any, same: Any, more: Any, rows: int, rows_more: int, full_scale: dict[str, float] | None
    ) -> bool | None:
        """Whether the model multiplies a site by N/B; None for a site that is not about the rows."""
        grows = _numel(few) * rows_more == _numel(more) * rows and _numel(few) != _numel(more)
        if not grows:
            if _differs(few, same) or _numel(few) != _numel(more):
                raise ModelError(
                    f"Observed site '{name}' depends on the data, but its size does not follow the number of rows, so "
                    "its log-likelihood cannot be scaled by N/B. Observe one value for each row, in "
                    "`with pyro.plate('data', len(x))`, or use the full batch."
                )
            return None
        scale, scale_more = float(few["scale"]), float(more["scale"])
        full, factor = self._num_data, self._num_data / rows
        if _close(scale, scale_more):
            return self._constant_scale(name, scale, factor, full_scale)
        if not _close(scale * rows, scale_more * rows_more):
            raise ModelError(_twice_message(name, scale, factor))
        stated = scale * rows
        if full_scale is not None and _close(full_scale[name] * full, stated):
            return True
        if full_scale is None and _close(stated, full):
            return True
        raise ModelError(
            f"Observed site '{name}' scales a batch of {rows} rows by {scale:g}, as if there were {stated:g} data; "
            f"there are {full}. State N once: in the plate, pyro.plate('data', N, subsample_size=len(x)), or by "
            "num_data=N."
        )

    def _constant_scale(self, name: str, scale: float, factor: float, full_scale: dict[str, float] | None) -> bool:
        # A loader's batches were probed in halves, so a hand-written constant N/B is that of the whole batch.
        whole = factor if self._is_full_known else self._num_data / self._rows
        if _close(scale, 1.0):
            return False
        if _close(scale, whole):
            if self._is_full_known:
                raise ModelError(_twice_message(name, scale, whole))
            return True
        if full_scale is not None and _close(full_scale[name], scale):
            return False  # tempered by hand, on the full data too
        raise ModelError(
            f"Observed site '{name}' carries the scale {scale:g}, which is neither 1 nor N/B = {whole:g}. Remove the "
            "hand-written scale; the kernel scales by N/B. To temper the posterior use temperature=."
        )


def _twice_message(name: str, scale: float, expected: float) -> str:
    return (
        f"Observed site '{name}' is scaled by {scale:g} where N/B = {expected:g} is right: N/B counts twice, or by "
        "hand beside what plate and kernel do. State N once: drop poutine.scale, or drop the plate's subsample_size."
    )


def _tensors(call: Call) -> list[Tensor]:
    leaves = tree_leaves((call.args, call.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]


def _numel(site: Mapping[str, Any]) -> int:
    """Number of scalars that a site scores; for a pyro.factor the size of its term."""
    # An improper prior's batch_shape may be a plain tuple.
    return max(int(torch.as_tensor(site["value"]).numel()), torch.Size(site["fn"].batch_shape).numel())


def _differs(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    first, second = (torch.as_tensor(s["fn"].log_prob(s["value"])).sum() for s in (one, other))
    return not torch.allclose(first, second, rtol=1e-5, atol=1e-6)


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * max(abs(a), abs(b))


def _product(factors: Any) -> float:
    result = 1.0
    for factor in factors:
        result *= factor
    return result
