# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Latent sites of a model as one flat unconstrained vector, and back.

Sampling, distillation and drawing work on a matrix ``theta_SD``: ``S`` draws of the ``D`` unconstrained numbers of a
model. Only this module knows which entry belongs to which site.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.constraints import Constraint


@dataclass(frozen=True)
class Site:
    """One latent site.

    :ivar str name: the site's name in the model.
    :ivar tuple shape: shape of one value, constrained (as the model sees it).
    :ivar tuple unconstrained_shape: shape of one value in unconstrained space.
    :ivar Constraint support: the constraint that values satisfy.
    :ivar int start: first entry in the flat vector.
    """

    name: str
    shape: tuple[int, ...]
    unconstrained_shape: tuple[int, ...]
    support: Constraint
    start: int

    @cached_property
    def size(self) -> int:
        """Number of entries in the flat vector."""
        return math.prod(self.unconstrained_shape)

    @property
    def stop(self) -> int:
        """One past the last entry in the flat vector."""
        return self.start + self.size

    @cached_property
    def transform(self) -> Transform:
        """From unconstrained to constrained values."""
        transform: Transform = biject_to(self.support)
        return transform

    @property
    def is_real(self) -> bool:
        """Whether the two spaces are the same, so that no Jacobian is needed."""
        return _base(self.support) is constraints.real


class Layout(Sequence[Site]):
    """The latent sites of a model, in order, and the position of each in the flat vector.

    :param shapes: constrained shape of one value, by site.
    :param supports: :mod:`torch.distributions.constraints` by site; a missing one counts as ``real``.
    :raises ValueError: if a support is discrete, or a shape does not fit its support.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], supports: Mapping[str, Constraint] | None = None) -> None:
        supports = {} if supports is None else supports
        sites: list[Site] = []
        start = 0
        for name, shape in shapes.items():
            support = _normalise(_of_mixture(name, supports.get(name, constraints.real)))
            if support.is_discrete:
                raise ValueError(f"Site '{name}' has discrete support {support}; gradients need continuous latents.")
            try:
                unconstrained = tuple(biject_to(support).inverse_shape(torch.Size(shape)))
            except NotImplementedError as error:
                raise ValueError(
                    f"Site '{name}' has the support {support}, which torch has no transform to the reals for: a "
                    "sampler by gradients needs one. Draw it from a distribution over the reals, and transform it in "
                    "the model."
                ) from error
            sites.append(Site(name, tuple(shape), unconstrained, support, start))
            start += sites[-1].size
        self._sites = tuple(sites)
        self._by_name = {site.name: site for site in sites}
        #: Total number of unconstrained entries, ``D``.
        self.size = start

    @classmethod
    def from_draws(cls, draws: Mapping[str, Tensor], supports: Mapping[str, Constraint] | None = None) -> Layout:
        """Layout of a dict of draws ``(S, ...)``; a missing support counts as real."""
        return cls({name: value.shape[1:] for name, value in draws.items()}, supports)

    @classmethod
    def from_trace(cls, trace: Any, names: Sequence[str] | None = None) -> Layout:
        """Layout of the latent sample sites of a :class:`pyro.poutine.Trace`; of ``names`` only, where given.

        :raises ValueError: if a site is discrete, or one of ``names`` is not in the trace.
        """
        sites = {name: site for name, site in trace.iter_stochastic_nodes() if not is_subsample(site)}
        if names is not None:
            missing = [name for name in names if name not in sites]
            if missing:
                raise ValueError(f"The model has no latent sites {missing}; it has {sorted(sites)}.")
            sites = {name: sites[name] for name in names}
        return cls(
            {name: site["value"].shape for name, site in sites.items()},
            {name: site["fn"].support for name, site in sites.items()},
        )

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def __getitem__(self, key: Any) -> Any:
        return self._by_name[key] if isinstance(key, str) else self._sites[key]

    def __contains__(self, key: object) -> bool:
        return key in self._by_name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Layout({', '.join(f'{s.name}{list(s.shape)}' for s in self)}; D={self.size})"

    @property
    def names(self) -> tuple[str, ...]:
        """Site names, in order."""
        return tuple(site.name for site in self)

    @property
    def is_real(self) -> bool:
        """Whether every site is unconstrained."""
        return all(site.is_real for site in self)

    @property
    def transforms(self) -> dict[str, Transform]:
        """Transforms by site, from constrained to unconstrained values: the direction that Pyro's kernels use."""
        return {site.name: site.transform.inv for site in self}

    def groups(self) -> dict[str, tuple[Site, ...]]:
        """Sites by layer: the part of the name before the last dot (``net.0`` for ``net.0.weight``)."""
        groups: dict[str, list[Site]] = {}
        for site in self:
            groups.setdefault(site.name.rpartition(".")[0] or site.name, []).append(site)
        return {name: tuple(sites) for name, sites in groups.items()}

    def split(self, theta: Tensor) -> dict[str, Tensor]:
        """``(..., D)`` to unconstrained values by site, as views."""
        batch = theta.shape[:-1]
        # One split rather than one slice per site: its gradient is a single concatenation.
        parts = theta.split([site.size for site in self], dim=-1) if len(self) else ()
        return {s.name: part.reshape(batch + s.unconstrained_shape) for s, part in zip(self, parts, strict=True)}

    def join(self, unconstrained: Mapping[str, Tensor]) -> Tensor:
        """Unconstrained values by site, with equal leading dimensions, to ``(..., D)``."""
        parts = []
        for site in self:
            value = unconstrained[site.name]
            batch = value.shape[: value.dim() - len(site.unconstrained_shape)]
            parts.append(value.reshape((*batch, site.size)))
        return torch.cat(parts, dim=-1) if parts else torch.empty(0)

    def constrain(self, theta: Tensor) -> dict[str, Tensor]:
        """``(..., D)`` to values by site as the model sees them, shapes ``(..., *site.shape)``."""
        return self.constrain_sites(self.split(theta))

    def constrain_sites(self, unconstrained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Unconstrained values by site, as :meth:`split` gives them, to values as the model sees them."""
        return {s.name: unconstrained[s.name] if s.is_real else s.transform(unconstrained[s.name]) for s in self}

    def unconstrain(self, draws: Mapping[str, Tensor]) -> Tensor:
        """Values by site as the model sees them, with equal leading dimensions, to ``(..., D)``.

        :raises ValueError: if a site is missing, or a trailing shape is not the site's.
        """
        values = {}
        for site in self:
            if site.name not in draws:
                raise ValueError(f"Draws lack site '{site.name}'; they hold {sorted(draws)}. Pass draws of all sites.")
            value = draws[site.name]
            dim = len(site.shape)
            if tuple(value.shape[value.dim() - dim :]) != site.shape or value.dim() < dim:
                raise ValueError(
                    f"Site '{site.name}' has draws of shape {tuple(value.shape)}; its trailing dimensions must be "
                    f"{site.shape}."
                )
            values[site.name] = value if site.is_real else site.transform.inv(value)
        return self.join(values)

    def log_abs_det_jacobian(self, theta: Tensor) -> Tensor:
        """log |d constrained / d unconstrained| summed over sites, ``(...)`` for ``theta`` of shape ``(..., D)``."""
        return self.log_abs_det_jacobian_sites(self.split(theta)) + theta.new_zeros(theta.shape[:-1])

    def log_abs_det_jacobian_sites(self, unconstrained: Mapping[str, Tensor]) -> Tensor | float:
        """The same for unconstrained values by site; the number 0 where every site is real."""
        total: Tensor | float = 0.0
        for site in self:
            if not site.is_real:
                value = unconstrained[site.name]
                batch = value.shape[: value.dim() - len(site.unconstrained_shape)]
                term = site.transform.log_abs_det_jacobian(value, site.transform(value))
                total = total + term.reshape(*batch, -1).sum(-1)
        return total

    def to_json(self) -> list[dict[str, Any]]:
        """A description in values that JSON can hold, from which :meth:`from_json` rebuilds the layout."""
        return [{"name": s.name, "shape": list(s.shape), "support": _support_to_json(s.support)} for s in self]

    @classmethod
    def from_json(cls, description: Sequence[Mapping[str, Any]]) -> Layout:
        """Inverse of :meth:`to_json`.

        :raises ValueError: if the description is malformed, or names an unknown support.
        """
        try:
            shapes = {str(d["name"]): tuple(int(n) for n in d["shape"]) for d in description}
            supports = {str(d["name"]): _support_from_json(d["support"]) for d in description}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Malformed layout: {error!r}.") from error
        if len(shapes) != len(description) or any(n < 0 for shape in shapes.values() for n in shape):
            raise ValueError("Malformed layout: duplicate names or negative sizes.")
        return cls(shapes, supports)


def is_subsample(site: Mapping[str, Any]) -> bool:
    """Whether a traced site is the index draw of a :class:`pyro.plate`, which Pyro records as a latent, too."""
    return bool(site_is_subsample(site))


# Supports without parameters, by their name in files.
_PLAIN: dict[str, Constraint] = {
    "real": constraints.real,
    "positive": constraints.positive,
    "nonnegative": constraints.nonnegative,
    "unit_interval": constraints.unit_interval,
    "simplex": constraints.simplex,
    "corr_cholesky": constraints.corr_cholesky,
    "lower_cholesky": constraints.lower_cholesky,
    "positive_definite": constraints.positive_definite,
}
_BOUNDED: dict[str, tuple[type[Constraint], tuple[str, ...]]] = {
    "interval": (type(constraints.interval(0.0, 1.0)), ("lower_bound", "upper_bound")),
    "greater_than": (type(constraints.greater_than(0.0)), ("lower_bound",)),
    "greater_than_eq": (type(constraints.greater_than_eq(0.0)), ("lower_bound",)),
    "less_than": (type(constraints.less_than(0.0)), ("upper_bound",)),
    "half_open_interval": (type(constraints.half_open_interval(0.0, 1.0)), ("lower_bound", "upper_bound")),
}


def _pyro_supports() -> dict[str, Constraint]:
    """Pyro's own supports with a transform to the reals, those that this version of Pyro has."""
    from pyro.distributions import constraints as pyro_constraints

    names = ("ordered_vector", "positive_ordered_vector", "sphere", "softplus_positive", "unit_lower_cholesky")
    return {name: getattr(pyro_constraints, name) for name in names if hasattr(pyro_constraints, name)}


def _base(support: Constraint) -> Constraint:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _normalise(support: Constraint) -> Constraint:
    """``real`` for any number of event dimensions over the reals; other supports unchanged."""
    if _base(support) is constraints.real_vector or _base(support) is constraints.real:
        return constraints.real
    return support


def _of_mixture(name: str, support: Constraint) -> Constraint:
    """The support of each component, of a mixture of one family."""
    if isinstance(support, constraints.independent):
        return constraints.independent(_of_mixture(name, support.base_constraint), support.reinterpreted_batch_ndims)
    if type(support).__name__ != "MixtureSameFamilyConstraint":
        return support
    component: Constraint = vars(support)["base_constraint"]
    if any(isinstance(bound, Tensor) and bound.numel() > 1 for bound in vars(_base(component)).values()):
        raise ValueError(
            f"Site '{name}' is a mixture of components with different supports, {component}: no transform to the reals "
            "has all of them. Give the components one support."
        )
    return component


def _support_to_json(support: Constraint) -> dict[str, Any]:
    if isinstance(support, constraints.independent):
        base = _support_to_json(support.base_constraint)
        return {"kind": "independent", "base": base, "dims": support.reinterpreted_batch_ndims}
    for name, plain in {**_PLAIN, **_pyro_supports()}.items():
        if support is plain:
            return {"kind": name}
    for name, (cls, bounds) in _BOUNDED.items():
        if type(support) is cls:
            return {"kind": name, **{b: torch.as_tensor(getattr(support, b)).tolist() for b in bounds}}
    # Instances without attributes (Pyro makes several of one class) are recognised by their type.
    for name, plain in {**_PLAIN, **_pyro_supports()}.items():
        if type(support) is type(plain) and not vars(support):
            return {"kind": name}
    raise ValueError(f"Support {support} cannot be written to a file; known are {sorted([*_PLAIN, *_BOUNDED])}.")


def _support_from_json(description: Mapping[str, Any]) -> Constraint:
    kind = description["kind"]
    if kind == "independent":
        return constraints.independent(_support_from_json(description["base"]), int(description["dims"]))
    if kind in _BOUNDED:
        cls, bounds = _BOUNDED[kind]
        values = [description[b] for b in bounds]
        return cls(*(v if isinstance(v, (int, float)) else torch.tensor(v) for v in values))
    known = {**_PLAIN, **_pyro_supports()}
    if kind not in known:
        raise ValueError(f"Unknown support {kind!r}; known are {sorted([*known, *_BOUNDED])}.")
    return known[kind]
