# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Establishes, before the first step, how a model scales the likelihood of a mini-batch; refuses what is unclear.

The potential is U = -log p(theta) - (N/B) sum log p(y_i | theta). Pyro models state N/B in several ways: a subsampled
plate scales by itself, a model written for full data does not, and an observed site may not depend on the data at all.
A wrong guess gives a posterior of the wrong temperature without any error. So each site is tested: the model is run on
batches of different rows and different sizes with the same latents, at two points, and the results must be consistent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine

from pyro_apd.data.minibatch import ProbeRows
from pyro_apd.errors import ModelError
from pyro_apd.models.probe import Probe, Values
from pyro_apd.models.probe_messages import latent_in_plate_message
from pyro_apd.models.tracing import run_model, subsampled_plates


def check_plates(
    model: Callable[..., Any],
    plates: Mapping[str, tuple[int, int]],
    axes: tuple[ProbeRows, ...],
    points: Sequence[Values],
    trace: poutine.Trace,
) -> None:
    """For a model that subsamples itself: every observation of the data must lie in the plate, and be scaled once.

    :param plates: ``(size, subsample_size)`` by name.
    :param axes: the rows of each plate.
    :param points: constrained values of the latents, at which the model is compared.
    :param trace: a run of the model.
    :raises ModelError: if that is not so, or a latent lies in a subsampled plate.
    """
    _refuse_sequential(plates, trace)
    for name in points[0]:
        for frame in trace.nodes[name]["cond_indep_stack"]:
            if frame.name in plates:
                raise ModelError(latent_in_plate_message(name, frame.name))
    changing = False
    for rows in axes:
        size, _ = plates[str(rows.plate)]
        changing |= _check_plate(Probe(model, size, rows, points), rows, plates)
    if not changing:
        raise ModelError(
            f"Plates {sorted(plates)} draw a subsample, but no observed site changes with it: every mini-batch "
            "would see the same rows. Give mcmc.run the full data and let the model take its rows with pyro.subsample "
            "or the plate's indices; or feed batches through a DataLoader (with num_data=) or batch_size=."
        )


def _check_plate(probe: Probe, rows: ProbeRows, plates: Mapping[str, tuple[int, int]]) -> bool:
    """Checks all sites against the rows of one plate; returns whether any observed site depends on them."""
    plate = str(rows.plate)
    probe.check_latents_by_shape()
    for name in probe.runs[0].one.latents:
        probe.check_constant(name, "The prior of latent site")
    changing = False
    probe.check_ranks()
    for name in probe.runs[0].one.observed:
        inside = plate in probe.runs[0].one.site(name).plates
        depends = probe.depends_on_rows(name)
        changing |= depends
        if depends and not inside:
            raise ModelError(
                f"Observed site '{name}' depends on the rows that plate '{plate}' selects, but lies outside it, so "
                "its log-likelihood is not scaled by N/B. Move it inside the plate."
            )
        if inside:
            _check_plate_scale(probe, name, plates)
            probe.check_sum(name, _by_number(probe, name))
        else:
            others = not plates.keys().isdisjoint(probe.runs[0].one.site(name).plates)
            probe.check_constant(name, "Observed site", other_plates=others)
    return changing


def _check_plate_scale(probe: Probe, name: str, plates: Mapping[str, tuple[int, int]]) -> None:
    first = probe.runs[0]
    site = first.one.site(name)
    if site.same_scale is None:
        return
    ratios = [size / batch for plate, (size, batch) in plates.items() if plate in site.plates]
    expected = math.prod(ratios)
    for twice in (expected, *ratios):
        if _close(site.same_scale, twice * expected) and not _close(twice, 1.0):
            raise ModelError(_scaled_twice_message(name, site.same_scale, expected))
    if site.scale is None:
        return
    resized = first.resized
    scale = None if resized is None else resized.site(name).scale
    if resized is not None and scale is not None:
        stated = site.scale * first.one.num_rows
        if not _close(stated, scale * resized.num_rows):
            raise ModelError(_scaled_twice_message(name, site.scale, expected))


def _by_number(probe: Probe, name: str) -> Callable[[int], float]:
    """Terms that include a scale by row include N/B of their plate."""
    is_scaled_by_row = probe.runs[0].one.site(name).scale is None
    return (lambda rows: float(rows)) if is_scaled_by_row else (lambda rows: 1.0)


def _refuse_sequential(plates: Mapping[str, tuple[int, int]], trace: poutine.Trace) -> None:
    for _, site in trace.nodes.items():
        for frame in site.get("cond_indep_stack", ()):
            if frame.name in plates and not frame.vectorized:
                raise ModelError(
                    f"Plate '{frame.name}' is a loop over a subsample: the names of its sites change with the rows, so "
                    f"they are other sites at every step. Write `with pyro.plate('{frame.name}', N, subsample_size=B) "
                    "as rows:` and observe all its rows at once, y[rows]."
                )


def scaled_sites(
    model: Callable[..., Any], num_data: int, rows: ProbeRows, points: Sequence[Values]
) -> dict[str, bool]:
    """For a model that is given ready rows: the observed sites that depend on the rows.

    :param num_data: N.
    :param rows: on which the model can be called.
    :param points: constrained values of the latents, at which the model is compared.
    :returns: whether the model multiplies the site by N/B itself, by site.
    :raises ModelError: if that cannot be established, or a site is not a sum over rows.
    """
    probe = Probe(model, num_data, rows, points)
    probe.check_latents_by_shape()
    trace = run_model(model, rows.call(torch.arange(rows.batch_size)), points[0])
    _check_stated_sizes(trace, num_data, rows)
    for name in probe.runs[0].one.latents:
        probe.check_constant(name, "The prior of latent site")
    probe.check_ranks()
    found = {}
    for name in probe.runs[0].one.observed:
        if probe.follows_rows(name):
            found[name] = _ScaleOf(probe, name, num_data, rows.batch_size).is_by_model()
        else:
            probe.check_constant(name, "Observed site")
            probe.check_independent(name)
    return found


def _check_stated_sizes(trace: poutine.Trace, num_data: int, rows: ProbeRows) -> None:
    count = rows.batch_size
    for name, (size, batch) in subsampled_plates(trace).items():
        if batch != count or size != num_data:
            raise ModelError(
                f"Plate '{name}' takes {batch} of {size} rows, but is fed batches of {count} rows out of {num_data}. "
                "Either let the model subsample (full data to mcmc.run, no batch_size=), or let the kernel do it: "
                f"pyro.plate('{name}', len(x)) in the model."
            )


class _ScaleOf:
    """Finds whether the model multiplies an observed site by N/B."""

    def __init__(self, probe: Probe, name: str, num_data: int, batch_size: int) -> None:
        self._probe = probe
        self._name = name
        self._num_data = num_data
        self._batch_size = batch_size

    def is_by_model(self) -> bool:
        """Whether the model does so itself, after the site was found to be a sum over rows.

        :raises ModelError: if it cannot be established.
        """
        runs = self._probe.runs[0]
        assert runs.resized is not None
        one, other = runs.one.site(self._name), runs.resized.site(self._name)
        if one.scale is None or other.scale is None:
            by_model, scale = self._scales_each_row(), one.same_scale
            is_same = all(run.site(self._name).same_scale == scale for run in runs.all)
            if by_model or not is_same or scale is None or not _close(scale, self._num_data / self._batch_size):
                return by_model
            return self._is_hand_scaled(scale, self._full_scale())
        by_model = self._scales_itself(one.scale, other.scale, runs.resized.num_rows, self._full_scale())
        self._probe.check_sum(self._name)
        return by_model

    def _full_scale(self) -> float | None:
        full = self._probe.full
        return None if full is None else full.site(self._name).same_scale

    def _scales_each_row(self) -> bool:
        """With a scale for each row: whether it is divided by the number of rows."""
        try:
            self._probe.check_sum(self._name)
        except ModelError:
            with_number = self._is_sum_times_rows()
            if not with_number:
                raise
            return True
        return False

    def _is_sum_times_rows(self) -> bool:
        try:
            self._probe.check_sum(self._name, lambda rows: float(rows))
        except ModelError:
            return False
        return True

    def _scales_itself(self, scale: float, other_scale: float, num_other: int, full_scale: float | None) -> bool:
        """Whether the model multiplies a site by N/B.

        :param scale: of the site on the rows of a batch; ``other_scale`` on ``num_other``, ``full_scale`` on all, None
            where not known.
        """
        rows, name = self._batch_size, self._name
        if _close(scale, other_scale):
            return self._is_hand_scaled(scale, full_scale)
        stated = scale * rows  # the N that the model states
        if not _close(stated, other_scale * num_other):
            raise ModelError(_scaled_twice_message(name, scale, self._num_data / rows))
        if _close(stated, self._num_data if full_scale is None else full_scale * self._num_data):
            return True
        raise ModelError(
            f"Observed site '{name}' scales a batch of {rows} rows by {scale:g}, as if there were {stated:g} data; "
            f"there are {self._num_data}. State N once: in the plate, pyro.plate('data', N, subsample_size=len(x)), or "
            "by num_data=N."
        )

    def _is_hand_scaled(self, scale: float, full_scale: float | None) -> bool:
        """Whether a scale that is the same for any number of rows is N/B, written by hand."""
        expected = self._num_data / self._batch_size
        if _close(scale, 1.0):
            return False
        if _close(scale, expected):
            if full_scale is not None:
                raise ModelError(_scaled_twice_message(self._name, scale, expected))
            return True
        if full_scale is not None and _close(full_scale, scale):
            return False  # tempered by hand, on the full data too
        raise ModelError(
            f"Observed site '{self._name}' carries the scale {scale:g}, which is neither 1 nor N/B = {expected:g}. "
            "Remove the hand-written scale; the kernel scales by N/B. To temper the posterior use temperature=."
        )


def _scaled_twice_message(name: str, scale: float, expected: float) -> str:
    return (
        f"Observed site '{name}' is scaled by {scale:g} where N/B = {expected:g} is right: N/B counts twice, or by "
        "hand in addition to plate or kernel. State N once: drop poutine.scale, or drop the plate's subsample_size."
    )


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * max(abs(a), abs(b))
