# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Checks of what a prediction is given: the model, and where draws come from."""

from __future__ import annotations

from pyro_apd.predictive.draws import check_draws
from pyro_apd.runtime.tensor_checks import shape_of


def check_model_and_guide(model: object, guide: object) -> None:
    """:raises ValueError: if one of them cannot be called; a guide may be None."""
    if not callable(model):
        raise ValueError(f"`model` must be a Pyro model, a callable; got {shape_of(model)}.")
    if guide is not None and not callable(guide):
        raise ValueError(
            f"`guide` must be a Pyro guide, or a DistilledPosterior; got {shape_of(guide)}. Draws are given as "
            "posterior_samples=, those of an MCMC as posterior_samples=mcmc.get_samples()."
        )


def check_posterior_samples(posterior_samples: object) -> None:
    """:raises ValueError: if it is neither empty, nor draws ``(S, ...)`` by site."""
    if hasattr(posterior_samples, "get_samples"):
        raise ValueError(
            f"`posterior_samples` must be a dict of tensors (S, ...) by site; got {shape_of(posterior_samples)}. Give "
            "what its get_samples() returns."
        )
    if posterior_samples:
        check_draws(posterior_samples, "posterior_samples")


def check_return_sites(return_sites: object) -> None:
    """:raises ValueError: if it is neither None, nor a tuple, list or set of names."""
    is_listed = isinstance(return_sites, (list, tuple, set)) and all(isinstance(name, str) for name in return_sites)
    if return_sites is not None and not is_listed:
        raise ValueError(
            f"`return_sites` must be a tuple, list or set of site names, or None; got {return_sites!r:.80}."
        )
