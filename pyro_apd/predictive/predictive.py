# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What a model predicts under many draws of its latents, evaluated for all draws at once.

Everything here runs the user's model, as it stands, under :func:`torch.vmap` over draws, in chunks that fit in
memory. A model that :func:`torch.vmap` cannot do (data-dependent control flow, an operation without a batching rule)
is run draw by draw instead, and the logger ``pyro_apd`` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import pyro.infer
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor

from pyro_apd.data.arguments import drawn_latents, explaining_errors
from pyro_apd.models.frozen import reading
from pyro_apd.models.layout import Layout, is_subsample
from pyro_apd.models.shared_features import with_features
from pyro_apd.predictive import likelihoods
from pyro_apd.predictive.arguments import check_model_and_guide, check_posterior_samples, check_return_sites
from pyro_apd.predictive.draws import (
    Draws,
    DrawSource,
    StreamSampler,
    Values,
    check_chunk_size,
    take_draws,
)
from pyro_apd.predictive.observed_site import ObservedSite
from pyro_apd.predictive.reductions import reduce_outputs, reduction_names
from pyro_apd.predictive.site_names import check_sites
from pyro_apd.predictive.vmap_draws import Footprint, map_draws, map_one_by_one, parameters_valid, sample_freshly
from pyro_apd.runtime.checks import flag, integer
from pyro_apd.runtime.global_state import preserved_param_store, seeded
from pyro_apd.runtime.vectorisation import log_one_by_one

# A name that no site of a model has.
_VALID = "_pyro_apd_parameters_valid"


class Predictive(pyro.infer.Predictive):
    """:class:`pyro.infer.Predictive`, evaluated for all draws at once.

    Same arguments, keys, shapes, dtypes and values (sampled sites: the same distribution, from other random numbers).
    Differences: networks of ordinary layers are vectorised without plates or batched layers; a guide may return
    latents that Pyro pads with singleton dimensions of plates, as every autoguide of a model with a data plate does,
    and the network still gets them unpadded; samples that disagree in number raise. A call inside other Pyro handlers
    is left to Pyro's own, so that these handlers see what they would see.

    :param callable model: a Pyro model.
    :param dict posterior_samples: values ``(S, ...)`` by site, as ``MCMC.get_samples()`` gives them.
    :param callable guide: a Pyro guide, or a :class:`~pyro_apd.posterior.posterior.DistilledPosterior`, from which
        all draws are taken in one pass.
    :param int num_samples: number of draws; needed with a guide, or to predict from the prior.
    :param return_sites: names of sites to return, ``"_RETURN"`` for what the model returns. Empty: those not in
        ``posterior_samples``, all with a guide. None: all.
    :param bool parallel: use Pyro's own vectorisation by an outermost plate.
    :param int chunk_size: draws evaluated together; None chooses it by memory.
    :param reduce: names of averages over draws to return instead of one value per draw, computed while draws are
        made, in memory that does not grow with their number: see :func:`reduce_outputs`.
    :raises ValueError: if there is nothing to take draws from, draws disagree in number, or a number is not positive.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        posterior_samples: Mapping[str, Tensor] | None = None,
        guide: Callable[..., Any] | None = None,
        num_samples: int | None = None,
        return_sites: Collection[str] | None = (),
        parallel: bool = False,
        *,
        chunk_size: int | None = None,
        reduce: Collection[str] | str | None = None,
    ) -> None:
        check_model_and_guide(model, guide)
        check_posterior_samples(posterior_samples)
        num_samples = None if num_samples is None else integer("num_samples", num_samples)
        check_return_sites(return_sites)
        flag("parallel", parallel)
        check_chunk_size(chunk_size)
        super().__init__(model, posterior_samples, guide, num_samples, return_sites, parallel)
        self.chunk_size = chunk_size
        self.reduce = reduction_names(reduce)
        if self.reduce is not None and (return_sites is None or len(return_sites) or parallel):
            raise ValueError("`reduce` returns averages of the observed site; leave `return_sites` and `parallel` out.")

    def forward(self, *args: Any, **kwargs: Any) -> Values:
        """Values by site, each ``(S, ...)``.

        :param args: arguments of the model (and guide).
        :param kwargs: keyword arguments of the model (and guide).
        :raises ValueError: if ``_RETURN`` is asked for and the model does not return a tensor, or draws are of sites
            that the model does not have while some of its own have none.
        """
        with preserved_param_store(), torch.no_grad():
            if self.reduce is not None:
                return self._reduced(args, kwargs)
            if self.parallel or am_i_wrapped():
                if self.posterior_samples:
                    with poutine.block(), seeded(0):
                        nodes = _prototype(self.model, args, kwargs)[0].nodes
                    check_sites(nodes, self.posterior_samples, "posterior_samples")
                return {name: value.detach() for name, value in super().forward(*args, **kwargs).items()}
            if self.guide is None:
                return self._predict(self.posterior_samples, self.return_sites, args, kwargs)
            return self._predict(self._guide_draws(args, kwargs), self.return_sites or None, args, kwargs)

    def _reduced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Values:
        draws: Draws = self.posterior_samples if self.guide is None else self._guide_draws(args, kwargs)
        if not isinstance(draws, DrawSource) and not draws:
            raise ValueError("`reduce` needs posterior_samples or a guide; averages over the prior are not offered.")
        assert self.reduce is not None
        return reduce_outputs(self.model, draws, *args, names=self.reduce, chunk_size=self.chunk_size, **kwargs)

    def _guide_draws(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Draws:
        """Values of the guide's sites, shaped as the guide has them: without singleton dimensions for plates."""
        layout = getattr(self.guide, "layout", None)
        if isinstance(layout, Layout) and hasattr(self.guide, "get_samples"):
            read = self._check_sites(layout, args, kwargs)
            if isinstance(self.guide, StreamSampler):
                draws = self.guide.stream(self.num_samples)
                if draws.check is not None:
                    draws.check(self.model, read)
                return draws
            return take_draws(self.guide, self.num_samples, argument="guide")
        trace, footprint = _prototype(self.guide, args, kwargs)
        names = [*trace.stochastic_nodes, *trace.observation_nodes]
        return self._evaluate(self.guide, {}, names, footprint, args, kwargs)

    def _check_sites(self, layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """A posterior of another model would be ignored site by site, and the prior predicted instead.

        :returns: parameters and buffers that the model read.
        """
        with reading(self.model) as read:
            nodes = _prototype(self.model, args, kwargs)[0].nodes
        theirs = {site.name: tuple(nodes[site.name]["value"].shape) for site in layout if site.name in nodes}
        unlike = {s.name: (s.shape, theirs.get(s.name)) for s in layout if theirs.get(s.name) != s.shape}
        if unlike:
            raise ValueError(
                f"`guide` is a posterior of another model: its sites and shapes, and what the model has there, are "
                f"{unlike}. Use it with the model it was distilled from."
            )
        return read

    def _predict(
        self, draws: Draws, return_sites: Collection[str] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Values:
        args, kwargs = with_features(self.model, args, kwargs)
        trace, footprint = _prototype(self.model, args, kwargs)
        if not isinstance(draws, DrawSource):
            check_sites(trace.nodes, draws, "posterior_samples" if self.guide is None else "guide")
        shapes = {name: (self.num_samples, *shape) for name, shape in _shapes(trace, draws, return_sites).items()}
        at_hand = {} if isinstance(draws, DrawSource) else draws
        wanted = [name for name in shapes if name not in at_hand]
        computed = self._evaluate(self.model, draws, wanted, footprint, args, kwargs)
        # A latent given is returned as given; a copy, so that writing to a result leaves the posterior alone.
        return {
            name: computed[name].reshape(shape) if name in computed else at_hand[name].clone().reshape(shape)
            for name, shape in shapes.items()
        }

    def _evaluate(
        self,
        model: Callable[..., Any],
        draws: Draws,
        names: list[str],
        footprint: Footprint,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Values:
        if not names:
            return {}
        validate = dist.is_validation_enabled()

        def values_of(latents: Values, vectorised: bool) -> Values:
            sampler = _Sampler(validate) if vectorised else Messenger()
            conditioned = sampler(poutine.condition(model, data=latents))
            nodes = poutine.trace(conditioned).get_trace(*args, **kwargs).nodes
            values = {name: nodes[name]["value"] for name in names}
            if vectorised:
                values[_VALID] = torch.as_tensor(sampler.valid)
            return values

        chunk_size = self.chunk_size or footprint.chunk_size(self.num_samples)
        values = map_draws(values_of, draws, self.num_samples, chunk_size, model)
        if not values.pop(_VALID, torch.tensor(True)).all():
            # Pyro would have raised at the draw concerned, with a message about its distribution: let it.
            log_one_by_one("a distribution has invalid parameters")
            values = map_one_by_one(values_of, draws, self.num_samples)
        return values


class _Sampler(Messenger):
    """Samples sites under vmap, and keeps account of whether their distributions are allowed."""

    def __init__(self, validate: bool) -> None:
        super().__init__()
        self._validate = validate
        self.valid: Tensor | bool = True

    def _pyro_sample(self, msg: Any) -> None:
        if self._validate:
            self.valid = parameters_valid(msg["fn"]) & self.valid
        sample_freshly(msg)


def _prototype(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Footprint]:
    """One trace of the model under its prior, without the index sites of plates, and what running it took."""
    tracer = poutine.trace(InitMessenger(init_to_sample)(model))
    with Footprint() as footprint, explaining_errors(args, kwargs, lambda: drawn_latents(tracer.msngr.trace)):
        trace = tracer.get_trace(*args, **kwargs)
    frames = [f for site in trace.nodes.values() if site["type"] == "sample" for f in site["cond_indep_stack"]]
    trace.max_plate_nesting = -min((frame.dim for frame in frames if frame.vectorized), default=0)
    for name in [name for name, site in trace.nodes.items() if site["type"] == "sample" and is_subsample(site)]:
        trace.remove_node(name)
    return trace, footprint


def _shapes(trace: Any, draws: Draws, return_sites: Collection[str] | None) -> dict[str, tuple[int, ...]]:
    """Sites to return and the shape of one draw of each, as Pyro has them: plates that a site is not in count as 1."""
    shapes = {}
    for name in (*trace.stochastic_nodes, *trace.observation_nodes):
        if (name in return_sites) if return_sites else (return_sites is None or name not in draws):
            site = trace.nodes[name]
            missing = trace.max_plate_nesting - len(site["fn"].batch_shape)
            shapes[name] = (1,) * missing + tuple(site["value"].shape)
    if return_sites is not None and "_RETURN" in return_sites:
        value = trace.nodes["_RETURN"]["value"]
        if not isinstance(value, Tensor):
            raise ValueError(
                f"`return_sites` asks for '_RETURN', but the model returns a {type(value).__name__}; it must return "
                "one tensor. Record further values with pyro.deterministic and name these sites."
            )
        shapes["_RETURN"] = tuple(value.shape)
    return shapes


@dataclass(frozen=True)
class Outputs:
    """What a model says about each datum, before any observation is sampled.

    ``S`` draws, ``N`` data (batch and event dimensions of the observed site, flattened), ``K`` classes.

    :ivar str kind: ``"categorical"``, ``"bernoulli"``, ``"normal"`` or ``"other"``.
    :ivar str site: the observed site.
    :ivar Tensor probs_SNK: class probabilities, for ``"categorical"`` and ``"bernoulli"`` (``K = 2``, failure first).
    :ivar Tensor mean_SN: means of the observations, where their distribution has one and is not a classification.
    :ivar Tensor variance_SN: variances of the observations, likewise.
    """

    kind: str
    site: str
    probs_SNK: Tensor | None = None
    mean_SN: Tensor | None = None
    variance_SN: Tensor | None = None


def outputs(
    model: Callable[..., Any],
    draws: Draws,
    *args: Any,
    site: str | None = None,
    chunk_size: int | None = None,
    **kwargs: Any,
) -> Outputs:
    """Class probabilities, or mean and variance, of each datum under each draw.

    All rows are covered, also those that a plate with ``subsample_size`` leaves out in training.

    :param callable model: a Pyro model; it makes no difference whether it is given its targets.
    :param draws: values of the latents ``(S, ...)`` by site, or :meth:`DistilledPosterior.stream
        <pyro_apd.posterior.posterior.DistilledPosterior.stream>`, of which a chunk at a time is made.
    :param args: arguments of the model.
    :param str site: the observed site; needed where several sample sites are not in ``draws``.
    :param int chunk_size: draws evaluated together; None chooses it by memory, and cuts the data on a CPU into blocks
        of rows where rows are found not to depend on each other.
    :param kwargs: keyword arguments of the model.
    :raises ValueError: if draws are malformed, or ``site`` is not one of the model's.
    :raises ModelError: if the model has no observed site, or several and ``site`` is None.
    """
    with torch.no_grad():
        observed = ObservedSite(model, draws, args, kwargs, site)
        kind = likelihoods.kind(observed.fn)
        if kind == "other" and not likelihoods.has_moments(observed.fn):
            return Outputs(kind, observed.name)
        summary = likelihoods.function if kind in ("categorical", "bernoulli") else likelihoods.moments
        value = observed.evaluate(summary, draws, args, kwargs, chunk_size=chunk_size)
    if kind == "categorical":
        return Outputs(kind, observed.name, probs_SNK=value.exp_())
    if kind == "bernoulli":
        return Outputs(kind, observed.name, probs_SNK=torch.cat([-value, value], dim=-1).sigmoid_())
    return Outputs(kind, observed.name, mean_SN=value[..., 0], variance_SN=value[..., 1])


def function_values(
    model: Callable[..., Any],
    draws: Draws,
    *args: Any,
    site: str | None = None,
    chunk_size: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """What each draw computes as a real-valued function of the data, ``(S, N, F)``; differentiable in ``draws``.

    Log-probabilities of the classes for a categorical site, the logit for a Bernoulli site, location and log scale
    for a normal site; else mean and log standard deviation. In a loop, build a :class:`FunctionView` once instead.
    Parameters as in :func:`outputs`.

    :raises ValueError: if draws are malformed, or ``site`` is not one of the model's.
    :raises ModelError: if there is not one observed site, or its distribution has no mean and variance.
    """
    view = FunctionView(model, draws, *args, site=site, **kwargs)
    return view(draws, chunk_size=chunk_size)


class FunctionView:
    """:func:`function_values` as an object, with everything that does not depend on the draws found out once.

    :param callable model: a Pyro model.
    :param dict draws: an example of what will be given, at least one draw.
    :param args: arguments of the model, used by every call that brings none of its own.
    :param str site: the observed site; needed where several sample sites are not in ``draws``.
    :param kwargs: keyword arguments of the model.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        draws: Draws,
        *args: Any,
        site: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._args, self._kwargs = args, kwargs
        self._observed = ObservedSite(model, draws, args, kwargs, site)
        fn = self._observed.fn
        if likelihoods.kind(fn) == "other" and not likelihoods.has_moments(fn):
            raise likelihoods.without_moments(self._observed)

    def __call__(self, draws: Draws, *args: Any, chunk_size: int | None = None) -> Tensor:
        """``(S, N, F)`` for draws ``(S, ...)``; ``args`` replace the positional arguments of the model."""
        observed = self._observed
        if args and observed.is_subsampled:
            observed = ObservedSite(observed.model, draws, args, self._kwargs, observed.name)
        return observed.evaluate(likelihoods.function, draws, args or self._args, self._kwargs, chunk_size=chunk_size)


def log_likelihood(
    model: Callable[..., Any],
    draws: Draws,
    *args: Any,
    site: str | None = None,
    chunk_size: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Log-likelihood of each observation under each draw, ``(S, N)``, in nats; masked observations count 0.

    Not scaled by plates. ``N`` are the batch dimensions of the observed site, flattened: event dimensions are summed,
    and rows that a plate with ``subsample_size`` leaves out in training are included. Parameters as in
    :func:`outputs`; the arguments must hold the observations.

    :raises ValueError: if draws are malformed, ``site`` is not one of the model's, or the arguments hold no
        observations or, with Pyro's validation on, impossible ones.
    :raises ModelError: if there is not one observed site, or observations and distribution differ in shape.
    """
    with preserved_param_store(), torch.no_grad():
        observed = ObservedSite(model, draws, args, kwargs, site)
        if not observed.is_observed:
            raise ValueError(
                f"The arguments hold no observations for site '{observed.name}'; call as "
                "log_likelihood(model, draws, x, y) with the targets that the model takes."
            )
        log_prob_SN, in_support_SN = observed.evaluate(
            likelihoods.log_prob, draws, args, kwargs, chunk_size=chunk_size
        ).unbind(-1)
        validate = dist.is_validation_enabled()
    if validate and not in_support_SN.all():
        raise ValueError(
            f"{int((in_support_SN == 0).any(0).sum())} observations of site '{observed.name}' cannot come from its "
            f"distribution, {type(observed.fn).__name__}; check the targets for NaN and for values out of range."
        )
    return log_prob_SN
