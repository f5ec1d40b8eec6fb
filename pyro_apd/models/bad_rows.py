# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Finds rows of the data whose observed value is outside the support of its likelihood, in runs of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_apd.data.targets import outside_message, shown_value
from pyro_apd.errors import DataError
from pyro_apd.models.tracing import Site


def refuse_rows(runs: Iterable[Mapping[str, Site]], rows: Tensor | None) -> None:
    """Refuses a row whose observed value is outside the support, or has no finite density, in each of ``runs``.

    :param runs: observed sites by name; of one batch, with several values of the latents.
    :param rows: numbers of the batch's rows in the full data; None where they are not known.
    :raises DataError: naming row, value and support.
    """
    runs = iter(runs)
    sites = next(runs)
    bad = {name: found for name, found in _bad_rows(sites).items() if bool(found.any())}
    if not bad:
        return
    for other in runs:
        found = _bad_rows(other)
        bad = {name: mask & found[name] for name, mask in bad.items()}
    for name, mask in bad.items():
        if bool(mask.any()):
            raise DataError(_bad_row_message(name, sites, mask, rows))


def _bad_rows(sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """By observed site where a value is outside the support or, where none is, has no finite density."""
    found = {}
    for name, site in sites.items():
        inside = _inside(site)
        if bool(inside.all()):
            inside = _counted(site, torch.isfinite(torch.as_tensor(site["fn"].log_prob(site["value"]))))
        found[name] = ~inside
    return found


def _inside(site: Site) -> Tensor:
    """Whether values are in the support, in the shape of the site's log-density; True where they are masked."""
    fn, value, num_dims = site["fn"], torch.as_tensor(site["value"]), 0
    # Entries of an event that .to_event() made are looked at one by one: a mask inside may leave some out.
    while isinstance(fn, torch.distributions.Independent) and inner_mask(fn.base_dist) is not None:
        num_dims += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
    support = support_of(fn)
    try:
        inside = torch.tensor(True) if support is None else support.check(value)
        # A support may be of the entries of an event: those of pyro.factor, which has none, are in it.
        for _ in range(inside.dim() - max(value.dim() - fn.event_dim, 0)):
            inside = inside.all(-1)
    except (RuntimeError, ValueError, NotImplementedError):  # the density decides
        inside = torch.tensor(True)
    inside = _without(inner_mask(fn), inside)
    for _ in range(num_dims if inside.dim() >= num_dims else 0):
        inside = inside.all(-1)
    return _without(site["mask"], inside)


def _counted(site: Site, is_good: Tensor) -> Tensor:
    """``is_good``, and True where the site's log-density does not count."""
    mask = inner_mask(site["fn"])
    if isinstance(mask, Tensor) and mask.dim() > is_good.dim():
        mask = None  # of entries of an event, whose density leaves them out itself
    return _without(site["mask"], _without(mask, is_good))


def _without(mask: Any, is_good: Tensor) -> Tensor:
    """``is_good``, and True where ``mask`` is not set."""
    return is_good if mask is None else is_good | ~torch.as_tensor(mask, device=is_good.device).bool()


def _bad_row_message(name: str, sites: Mapping[str, Site], mask: Tensor, rows: Tensor | None) -> str:
    site = sites[name]
    place = tuple(int(i) for i in mask.nonzero()[0])
    value = torch.as_tensor(site["value"])
    dims = value.dim() - site["fn"].event_dim
    entry = value[place[len(place) - dims :]] if 0 < dims <= len(place) else value
    dim = _row_dim(site, mask, rows)
    if dim is None:
        where = f"entry {place}"
    else:
        where = f"row {place[dim] if rows is None else int(rows[place[dim]])}" + (" of a batch" if rows is None else "")
    count = int(mask.sum())
    support = support_of(site["fn"])
    shown = shown_value(entry, constraints.real if support is None else support)
    if support is not None and not bool(_inside(site).all()):
        return outside_message(name, likelihood_name(site["fn"]), support, shown, where, count)
    what = f" for its value {shown}" if entry.numel() else ""
    if any(other.endswith("_unobserved") for other in sites):
        where += " (in mini-batches, values that obs_mask= calls missing are NaN: use the full batch to infer them)"
    return (
        f"Observed site '{name}' has no finite log-density{what} in {where} at the starting point. Check the "
        "arguments of the model in that row, or give an init_strategy= where the density is positive."
    )


def _row_dim(site: Site, mask: Tensor, rows: Tensor | None) -> int | None:
    """The dimension of a site's batch that counts rows."""
    sizes = None if rows is None else len(rows)
    plates = [frame for frame in site["cond_indep_stack"] if frame.vectorized and -frame.dim <= mask.dim()]
    for frame in plates:
        if mask.shape[frame.dim] == sizes or (sizes is None and len(plates) == 1):
            return int(mask.dim() + frame.dim)
    return next((i for i, size in enumerate(mask.shape) if size == sizes), 0 if sizes is None and mask.dim() else None)


def failing_row(run: Callable[[Tensor], Any], rows: Tensor, error: Exception) -> tuple[int, Exception]:
    """A row on which a model fails, and how, by halving ``rows``; raises ``error`` if it seems to fail on all.

    :param run: runs the model on rows.
    """
    others = rows[[0, -1]]
    while len(rows) > 1:
        half = rows[: (len(rows) + 1) // 2]
        try:
            run(half if len(half) > 1 else half.repeat(2))  # a single row is squeezed away by some models
            rows = rows[len(half) :]
        except Exception:
            rows = half
    try:
        run(rows.repeat(2))
    except Exception as single:
        cause = single
    else:
        raise error
    for other in others:
        if type(cause) is type(error) and int(other) != int(rows):
            run(other.repeat(2))  # another row in the same way: else it is not about this one
            return int(rows), cause
    raise error


def failure_message(where: str, error: Exception) -> str:
    """The message about a model that fails on some rows only."""
    return (
        f"The model fails on {where} of its arguments and not on others: {type(error).__name__}: {str(error)[:300]}. "
        "Check it for values out of range, such as the indices of an embedding."
    )


def table_message(error: Exception) -> str:
    """The message about an index that a batch of rows is too short for."""
    return (
        f"The model fails on a batch of rows: IndexError: {str(error)[:300]}. With batch_size= every argument with as "
        "many rows as the first one is reduced to the rows of the batch. A table that is indexed by group, and has as "
        "many rows, is no such argument: give it to the model beforehand, functools.partial(model, table=table)."
    )


# -- distributions -----------------------------------------------------------------------------------------------------


def support_of(fn: Any) -> Constraint | None:
    """The support of a distribution; None where it does not say."""
    try:
        support = fn.support
    except (NotImplementedError, AttributeError, ValueError, RuntimeError):
        return None
    return support if isinstance(support, Constraint) else None


def likelihood_name(fn: Any) -> str:
    """The name of a distribution, without what only expands or masks it."""
    while hasattr(fn, "base_dist") and type(fn).__name__ in (
        "Independent",
        "ExpandedDistribution",
        "MaskedDistribution",
    ):
        fn = fn.base_dist
    return type(fn).__name__


def is_unvalidated(fn: Any) -> bool:
    """Whether a distribution was made with ``validate_args=False``, in a run with Pyro's validation.

    torch shows it in a private attribute. Where that is gone, all values are checked.
    """
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return getattr(fn, "_validate_args", True) is False


def inner_mask(fn: Any) -> Any:
    """The mask of ``fn.mask(...)``; None where there is none.

    Pyro shows it in a private attribute. Where that is gone, a masked value counts as one to check.
    """
    while hasattr(fn, "base_dist"):
        if type(fn).__name__ == "MaskedDistribution":
            return getattr(fn, "_mask", None)
        fn = fn.base_dist
    return None
