# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What each site of a model adds to the log joint density on chosen rows, and whether that is a sum over rows.

A mini-batch of B of N rows gives an unbiased gradient of the potential only if log p(rows | theta) is a sum of one term
for each row, and a row's term depends on that row and theta alone. Two relations test it, for disjoint sets of rows:

    log p(a, c) + log p(a', c') = log p(c', a) + log p(c, a')      exchanged rows, the same number in each call
    log p(a, c)                 = log p(a) + log p(c)               other numbers of rows

They are compared term by term where a site has a term for each row, in sorted order, so that the order of the terms has
no effect; otherwise as sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any
from unittest import mock

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor

from pyro_apd.data.minibatch import Call, ProbeRows
from pyro_apd.errors import ModelError
from pyro_apd.models.tracing import Site, check_latents, observed_sites, run_from_prior, run_model, subsampled_plates
from pyro_apd.runtime.trees import tree_flatten, tree_leaves, tree_unflatten


@dataclass(frozen=True)
class SiteTerms:
    """What one site adds to the log joint density in one run.

    :ivar terms: one-dimensional; without ``scale`` where that is a number.
    :ivar scale: the number by which the model multiplies the site; None for one number per row.
    :ivar same_scale: the same, also where all rows have the same number.
    :ivar int count: number of scalars that the site scores.
    :ivar plates: names of the plates that the site lies in.
    """

    terms: Tensor
    scale: float | None
    same_scale: float | None
    count: int
    plates: frozenset[str]

    @property
    def total(self) -> Tensor:
        """The sum of the terms, scaled."""
        return self.terms.sum() * (1.0 if self.scale is None else self.scale)

    def differs(self, other: SiteTerms, is_exact: bool = False) -> bool:
        """Whether the terms are others than those of ``other``, in any order; beyond rounding, or to the last bit."""
        if len(self.terms) != len(other.terms):
            return True
        if is_exact and not self.terms.is_cuda:
            return not torch.equal(self.terms.sort().values, other.terms.sort().values)
        return differs(self.terms, other.terms)


class ModelRun:
    """A run of a model on ``rows``, with given ``values`` of the latents.

    The terms of observed sites are computed at once, and may fail; those of latents when they are asked for.

    :param trace: the run.
    :param rows: their numbers ``(n,)``.
    :param values: values of the latents.
    :param dtype: of the terms, by default as they are.
    :ivar latents: names of the latent sites, and ``observed`` of the observed ones.
    :raises ModelError: if the run has other latents.
    """

    def __init__(
        self, trace: poutine.Trace, rows: Tensor, values: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> None:
        check_latents(trace, values)
        self.rows = rows
        self.values = values
        observed = {name: site for name, site in observed_sites(trace).items() if name not in values}
        self.latents = tuple(values)
        self.observed = tuple(observed)
        self._nodes = {name: trace.nodes[name] for name in values}
        self._dtype = dtype
        self._terms = {name: site_terms(site, dtype) for name, site in observed.items()}

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def site(self, name: str) -> SiteTerms:
        """The terms of a site.

        :raises ModelError: if this run has no such site.
        """
        if name in self._nodes:
            self._terms[name] = site_terms(self._nodes.pop(name), self._dtype)
        if name not in self._terms:
            raise ModelError(
                f"Site '{name}' is in one run of the model and not in another, with the same values of the latents. "
                "The sites of a model must not depend on the rows of a batch, their number or random numbers."
            )
        return self._terms[name]


class RowProbe:
    """Runs a model on chosen rows.

    :param model: a Pyro model.
    :param ProbeRows rows: the rows to choose from.
    """

    def __init__(self, model: Callable[..., Any], rows: ProbeRows) -> None:
        self._model = model
        self.rows = rows

    def trace(self, rows: Tensor, values: Mapping[str, Tensor] | None = None) -> poutine.Trace:
        """A run on ``rows`` ``(n,)``, with the latents set to the constrained ``values`` where given."""
        call = self.rows.call(rows)
        if self.rows.plate is not None:
            with resized_plate(self.rows.plate, len(rows)):
                return self._run_model(call, values)
        trace = self._run_model(call, values)
        plates = subsampled_plates(trace)
        if not plates:
            return trace
        indices = {name: torch.arange(count) for name, (_, count) in plates.items()}
        return self._run_model(Call(call.args, call.kwargs, indices), values)

    def _run_model(self, call: Call, values: Mapping[str, Tensor] | None) -> poutine.Trace:
        return run_from_prior(self._model, call) if values is None else run_model(self._model, call, values)

    def run(self, rows: Tensor, values: Mapping[str, Tensor]) -> ModelRun:
        """The same as terms by site.

        :raises ModelError: if the model has other latents than ``values``.
        """
        return ModelRun(self.trace(rows, values), rows, values, self._precision(values))

    def with_other_data(self, run: ModelRun) -> ModelRun | None:
        """A run with all data changed; None where the model does not take them."""

        def changed(leaf: Any) -> Any:
            return leaf + 1 if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.dtype != torch.bool else leaf

        def call(rows: Tensor) -> Call:
            found = self.rows.call(rows)
            leaves, spec = tree_flatten((found.args, found.kwargs))
            args, kwargs = tree_unflatten([changed(leaf) for leaf in leaves], spec)
            return Call(args, kwargs, found.indices)

        try:
            return RowProbe(self._model, replace(self.rows, call=call)).run(run.rows, run.values)
        except Exception:  # data that the model never meets
            return None

    def gradients(self, run: ModelRun, name: str) -> tuple[Tensor, ...]:
        """The gradient of what an observed site adds to the log joint density in a run, without a ``scale`` that is a
        number, by latent of a floating dtype."""
        with torch.enable_grad():
            values = {key: value.detach().clone().requires_grad_() for key, value in run.values.items()}
            site = self.trace(run.rows, values).nodes[name]
            total = _scaled_terms(site)[0].sum()
            leaves = list(values.values())
            if not total.requires_grad:
                return tuple(torch.zeros_like(leaf) for leaf in leaves)
            return torch.autograd.grad(total, leaves, materialize_grads=True)

    def _precision(self, values: Mapping[str, Tensor]) -> torch.dtype | None:
        """The coarsest floating dtype that the model computes with: terms in another one are no more exact."""
        call = self.rows.call(torch.zeros(1, dtype=torch.long))
        tensors = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
        dtypes = {tensor.dtype for tensor in (*tensors, *values.values()) if tensor.is_floating_point()}
        return min(dtypes, key=lambda dtype: -torch.finfo(dtype).eps, default=None)


def site_terms(site: Site, dtype: torch.dtype | None = None) -> SiteTerms:
    """The terms of a site as Pyro scores it, in ``dtype`` where given."""
    terms, number = _scaled_terms(site)
    terms = terms.detach() if dtype is None else terms.detach().to(dtype)
    shape = torch.Size(site["fn"].batch_shape)  # of some distributions a plain tuple
    count = max(int(torch.as_tensor(site["value"]).numel()), shape.numel())
    plates = frozenset(frame.name for frame in site["cond_indep_stack"])
    return SiteTerms(terms.reshape(-1), number, _same_number(site["scale"]), count, plates)


def _scaled_terms(site: Site) -> tuple[Tensor, float | None]:
    """The terms, and the number that they are still to be scaled by; None where they include a scale by row."""
    fn, scale, mask = site["fn"], site["scale"], site["mask"]
    number = float(scale) if not isinstance(scale, Tensor) or scale.dim() == 0 else None
    if number is not None and (mask is None or isinstance(mask, bool)):
        # Without to_event there are more terms to compare, and a change in one of them shows.
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
    terms = torch.as_tensor(fn.log_prob(site["value"], *site["args"], **site["kwargs"]))
    return scale_and_mask(terms, 1.0 if number is not None else scale, mask), number


def _same_number(scale: float | Tensor) -> float | None:
    """A scale that is one number, also where it is written once for each row."""
    if not isinstance(scale, Tensor):
        return float(scale)
    return float(scale.reshape(-1)[0]) if scale.numel() and bool((scale == scale.reshape(-1)[0]).all()) else None


@contextmanager
def resized_plate(name: str, num_rows: int) -> Iterator[None]:
    """Context in which a model's plate of this name takes ``num_rows`` rows, whatever ``subsample_size`` it states."""
    original = SubsampleMessenger.__init__
    thread = get_ident()

    def resized(self: Any, plate: str, size: Any = None, subsample_size: Any = None, *args: Any, **kwargs: Any) -> None:
        if plate == name and subsample_size is not None and get_ident() == thread:
            subsample_size = num_rows
        original(self, plate, size, subsample_size, *args, **kwargs)

    with mock.patch.object(SubsampleMessenger, "__init__", resized):
        yield


def differs(one: Tensor, other: Tensor) -> bool:
    """Whether terms that should be equal are not, beyond rounding.

    Those of one for each row are compared in sorted order; ``one`` and ``other`` have the same length.
    """
    if torch.equal(one, other):
        return False
    first, second = one.sort().values, other.sort().values
    rtol = relative_rounding(one)
    finite = first[first.isfinite()]
    size = float(finite.double().square().mean().sqrt()) if finite.numel() else 0.0
    return not torch.allclose(first, second, rtol=rtol, atol=rtol * (size + 0.05), equal_nan=True)


def totals_differ(one: Tensor, other: Tensor) -> bool:
    """Whether the sums of two sets of terms differ, beyond the rounding of sums."""
    difference = float(one.double().sum() - other.double().sum())
    size = float(one.abs().sum() + other.abs().sum())
    return math.isfinite(difference) and abs(difference) > 0.1 * relative_rounding(one) * size


def relative_rounding(terms: Tensor) -> float:
    """A relative difference above what rounding gives to a term when the number of rows changes."""
    if terms.dtype == torch.float64:
        return 1e-9
    is_coarse = terms.dtype != torch.float32 or (terms.is_cuda and torch.backends.cuda.matmul.allow_tf32)
    return 2e-2 if is_coarse else 2e-4
