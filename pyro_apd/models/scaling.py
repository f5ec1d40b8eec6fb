# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Establishes, before the first step, how a model scales the likelihood of a mini-batch; refuses what is unclear.

The potential is U = -log p(theta) - (N/B) sum log p(y_i | theta). Pyro models state N/B in several ways: a subsampled
plate scales by itself, a model written for full data does not, and an observed site may not depend on the data at all.
A wrong guess gives a posterior of the wrong temperature without any error. So each observed site is tested: the model
is run on batches of different rows and different sizes with the same latents, and the results must be consistent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_apd.data.minibatch import Call, ProbeCalls
from pyro_apd.errors import ModelError
from pyro_apd.models.tracing import Site, observed_sites, run_model, subsampled_plates


def check_plates(
    model: Callable[..., Any],
    plates: Mapping[str, tuple[int, int]],
    probe: ProbeCalls,
    start: Mapping[str, Tensor],
    trace: poutine.Trace,
) -> None:
    """For a model that subsamples itself: every observation of the data must lie in the plate, and be scaled once.

    :param plates: ``(size, subsample_size)`` by name.
    :param probe: calls of the model on different rows.
    :param start: constrained values of the latents.
    :param trace: a run of the model.
    :raises ModelError: if that is not so, or a latent lies in a subsampled plate.
    """
    assert probe.other is not None
    for name in start:
        for frame in trace.nodes[name]["cond_indep_stack"]:
            if frame.name in plates:
                raise ModelError(_latent_in_plate_message(name, frame.name))
    first = run_model(model, probe.few, start)
    second = run_model(model, probe.other, start)
    if not any(_differs(site, second.nodes[name]) for name, site in observed_sites(first).items()):
        raise ModelError(
            f"Plates {sorted(plates)} draw a subsample, but no observed site changes with it: every mini-batch "
            "would see the same rows. Give mcmc.run the full data and let the model take its rows with pyro.subsample "
            "or the plate's indices; or feed batches through a DataLoader (with num_data=) or batch_size=."
        )
    for name, site in observed_sites(first).items():
        ratios = [plates[f.name] for f in site["cond_indep_stack"] if f.name in plates]
        expected = math.prod(size / batch for size, batch in ratios)
        if not ratios and _differs(site, second.nodes[name]):
            raise ModelError(
                f"Observed site '{name}' depends on the rows that plate {sorted(plates)} selects, but lies "
                "outside it, so its log-likelihood is not scaled by N/B. Move it inside the plate."
            )
        if ratios and _close(float(site["scale"]), expected**2):
            raise ModelError(_scaled_twice_message(name, float(site["scale"]), expected))


def scaled_sites(
    model: Callable[..., Any], num_data: int, probe: ProbeCalls, start: Mapping[str, Tensor]
) -> dict[str, bool]:
    """For a model that is given ready rows: the observed sites that depend on the rows.

    :param num_data: N.
    :param probe: calls of the model on different rows.
    :param start: constrained values of the latents.
    :returns: whether the model multiplies the site by N/B itself, by site.
    :raises ModelError: if that cannot be established.
    """
    rows = _RowScaling(model, num_data, probe, start)
    return rows.of_one_row() if probe.more is None else rows.of_sites()


class _RowScaling:
    """Runs a model on batches of ready rows, and compares what each observed site scores."""

    def __init__(
        self, model: Callable[..., Any], num_data: int, probe: ProbeCalls, start: Mapping[str, Tensor]
    ) -> None:
        self._model = model
        self._num_data = num_data
        self._probe = probe
        self._start = start

    def of_sites(self) -> dict[str, bool]:
        """Whether the model scales them, of the sites that follow the rows."""
        probe = self._probe
        assert probe.other is not None
        assert probe.more is not None
        few = self._run(probe.few, probe.num_few)
        other = self._run(probe.other, probe.num_few)
        more = self._run(probe.more, probe.num_more)
        full = None if probe.full is None else self._run(probe.full, self._num_data)
        found = {}
        for name, site in observed_sites(few).items():
            if self._follows_rows(name, site, other.nodes[name], more.nodes[name]):
                full_scale = None if full is None else float(full.nodes[name]["scale"])
                scale, scale_more = float(site["scale"]), float(more.nodes[name]["scale"])
                found[name] = self._scales_itself(name, scale, scale_more, full_scale)
        return found

    def of_one_row(self) -> dict[str, bool]:
        """With batches of one row there is nothing to compare; only a model that does not scale at all is clear."""
        trace = run_model(self._model, self._probe.few, self._start)
        scales = {name: float(site["scale"]) for name, site in observed_sites(trace).items()}
        if len(scales) != 1 or set(scales.values()) != {1.0}:
            raise ModelError(
                f"With batches of one row the scaling of sites {scales} cannot be established. Use at least 2 rows."
            )
        return dict.fromkeys(scales, False)

    def _run(self, call: Call, rows: int) -> poutine.Trace:
        free = run_model(self._model, call)
        for name, value in self._start.items():
            site = free.nodes.get(name)
            frames = site["cond_indep_stack"] if site is not None else ()
            in_plate = next((f.name for f in frames if f.vectorized and f.size == rows), None)
            if site is None or site["value"].shape != value.shape or in_plate is not None:
                raise ModelError(_latent_in_plate_message(name, in_plate or "over the rows of the data"))
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

    def _follows_rows(self, name: str, few: Site, other: Site, more: Site) -> bool:
        """Whether a site scores one value per row; False for one that does not depend on the data."""
        num_few, num_more = self._probe.num_few, self._probe.num_more
        if _numel(few) * num_more == _numel(more) * num_few and _numel(few) != _numel(more):
            return True
        if _differs(few, other) or _numel(few) != _numel(more):
            raise ModelError(
                f"Observed site '{name}' depends on the data, but its size does not follow the number of rows, so "
                "its log-likelihood cannot be scaled by N/B. Observe one value for each row, in "
                "`with pyro.plate('data', len(x))`, or use the full batch."
            )
        return False

    def _scales_itself(self, name: str, scale: float, scale_more: float, full_scale: float | None) -> bool:
        """Whether the model multiplies a site by N/B.

        :param scale: of the site on few rows; ``scale_more`` on more, ``full_scale`` on all, None where not known.
        """
        rows = self._probe.num_few
        if _close(scale, scale_more):
            return self._is_hand_scaled(name, scale, full_scale)
        stated = scale * rows  # the N that the model states
        if not _close(stated, scale_more * self._probe.num_more):
            raise ModelError(_scaled_twice_message(name, scale, self._num_data / rows))
        if _close(stated, self._num_data if full_scale is None else full_scale * self._num_data):
            return True
        raise ModelError(
            f"Observed site '{name}' scales a batch of {rows} rows by {scale:g}, as if there were {stated:g} data; "
            f"there are {self._num_data}. State N once: in the plate, pyro.plate('data', N, subsample_size=len(x)), or "
            "by num_data=N."
        )

    def _is_hand_scaled(self, name: str, scale: float, full_scale: float | None) -> bool:
        """Whether a scale that is the same for any number of rows is N/B, written by hand."""
        expected = self._num_data / self._probe.batch_size
        if _close(scale, 1.0):
            return False
        if _close(scale, expected):
            if full_scale is not None:
                raise ModelError(_scaled_twice_message(name, scale, expected))
            return True
        if full_scale is not None and _close(full_scale, scale):
            return False  # tempered by hand, on the full data too
        raise ModelError(
            f"Observed site '{name}' carries the scale {scale:g}, which is neither 1 nor N/B = {expected:g}. Remove "
            "the hand-written scale; the kernel scales by N/B. To temper the posterior use temperature=."
        )


def _latent_in_plate_message(name: str, plate: str) -> str:
    return (
        f"Latent site '{name}' lies inside the subsampled plate '{plate}': it has one value for each datum, and a "
        "mini-batch sees only some of them. If it is a weight, read it (or call the network) before the plate; if it "
        "should be data, pass its value with obs= (was the target given to mcmc.run?); if it is a local latent, "
        "marginalise it or use the full batch."
    )


def _scaled_twice_message(name: str, scale: float, expected: float) -> str:
    return (
        f"Observed site '{name}' is scaled by {scale:g} where N/B = {expected:g} is right: N/B counts twice, or by "
        "hand in addition to plate or kernel. State N once: drop poutine.scale, or drop the plate's subsample_size."
    )


def _numel(site: Site) -> int:
    """Number of scalars that a site scores; for a pyro.factor the size of its term."""
    # An improper prior's batch_shape may be a plain tuple.
    return max(int(torch.as_tensor(site["value"]).numel()), torch.Size(site["fn"].batch_shape).numel())


def _differs(one: Site, other: Site) -> bool:
    first, second = (torch.as_tensor(s["fn"].log_prob(s["value"])).sum() for s in (one, other))
    return not torch.allclose(first, second, rtol=1e-5, atol=1e-6)


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * max(abs(a), abs(b))
