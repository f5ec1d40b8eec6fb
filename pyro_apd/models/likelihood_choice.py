# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The likelihood of a :class:`~pyro_apd.BNN` by its name, or by a function of the outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import Distribution

from pyro_apd.errors import DataError, ModelError
from pyro_apd.models.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    GaussianByInput,
    Likelihood,
    NegativeBinomial,
    Ordinal,
    Poisson,
    StudentT,
)
from pyro_apd.runtime import checks

#: Name of a likelihood, or a function of the outputs that returns one distribution per row.
LikelihoodSpec = str | Callable[[Tensor], Any]

NOISE_FLOOR = 1e-2
DEGREES_OF_FREEDOM = 4.0


@dataclass(frozen=True)
class LikelihoodOptions:
    """What a likelihood can be told; None where it is left to the likelihood. See :class:`~pyro_apd.BNN`."""

    noise_scale: float | None = None
    noise_prior: str | Distribution = "half_cauchy"
    noise_prior_scale: float = 1.0
    noise_floor: float | None = None
    degrees_of_freedom: float | None = None
    num_classes: int | None = None


class Custom(Likelihood):
    """A user's function of the outputs.

    :param function: from outputs ``(N, ...)`` to a :mod:`pyro.distributions` object of batch shape ``(N,)``.
    """

    name = "custom"
    link: str | None = None

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        self._function = function

    def distribution(self, output: Tensor, latents: Mapping[str, Any]) -> Any:
        """See :class:`Likelihood`.

        :raises ModelError: if the function returns anything else than one Pyro distribution per row.
        """
        fn = self._function(output)
        if not isinstance(fn, TorchDistributionMixin):
            kind = "one of torch.distributions" if isinstance(fn, Distribution) else type(fn).__name__
            raise ModelError(
                f"likelihood must return a distribution of pyro.distributions; it returned {kind}. Write, for example, "
                "likelihood=lambda outputs: dist.Laplace(outputs[:, 0], 1.0)."
            )
        if fn.batch_shape != (len(output),):
            raise ModelError(
                f"likelihood returned a {type(fn).__name__} of batch shape {tuple(fn.batch_shape)}; it must be "
                f"({len(output)},), one distribution per row.{_to_event_hint(fn, len(output))}"
            )
        return fn

    def checked_targets(self, y: Tensor, output: Tensor) -> Tensor:
        """See :class:`Likelihood`."""
        fn = self.distribution(output, {})
        if y.shape != fn.shape():
            raise DataError(
                f"likelihood returned a {type(fn).__name__} over targets of shape {tuple(fn.shape())}; got "
                f"{tuple(y.shape)}. Reshape the targets."
            )
        is_real = not fn.support.is_discrete
        return y.to(output.dtype) if is_real and not y.is_floating_point() else y

    def _fitting(self, output: Tensor) -> Tensor:
        return output


def _to_event_hint(fn: Any, num_data: int) -> str:
    """How to give a distribution of another batch shape one batch dimension."""
    if fn.batch_shape[:1] == (num_data,):
        return f" Add .to_event({len(fn.batch_shape) - 1})."
    return " Its parameters need a first dimension of the rows of the outputs."


_CONSTRUCTORS: dict[str, Callable[[LikelihoodOptions], Likelihood]] = {
    "categorical": lambda o: Categorical(),
    "gaussian": lambda o: Gaussian(o.noise_scale, o.noise_prior, o.noise_prior_scale),
    "bernoulli": lambda o: Bernoulli(),
    "gaussian_by_input": lambda o: GaussianByInput(NOISE_FLOOR if o.noise_floor is None else o.noise_floor),
    "student_t": lambda o: StudentT(
        DEGREES_OF_FREEDOM if o.degrees_of_freedom is None else o.degrees_of_freedom,
        o.noise_scale,
        o.noise_prior,
        o.noise_prior_scale,
    ),
    "poisson": lambda o: Poisson(),
    "negative_binomial": lambda o: NegativeBinomial(),
    "ordinal": lambda o: Ordinal(o.num_classes),
}
# Options that only some likelihoods have; a value of None is none given.
_OWNERS = {
    "noise_scale": ("gaussian", "student_t"),
    "noise_floor": ("gaussian_by_input",),
    "degrees_of_freedom": ("student_t",),
    "num_classes": ("ordinal",),
}


def make_likelihood(spec: LikelihoodSpec, options: LikelihoodOptions) -> Likelihood:
    """The likelihood of a name, or of a function of the outputs.

    :raises ValueError: if the name is unknown, or an option is out of range or of another likelihood.
    """
    is_name = isinstance(spec, str) or not callable(spec)
    name = checks.choice("likelihood", spec, tuple(_CONSTRUCTORS)) if is_name else Custom.name
    for option, owners in _OWNERS.items():
        value = getattr(options, option)
        if value is not None and name not in owners:
            whose = " or ".join(map(repr, owners))
            raise ValueError(
                f"{option}={value!r} belongs to likelihood={whose}; this one is {name!r}. Leave {option} out."
            )
    if is_name:
        return _CONSTRUCTORS[name](options)
    assert callable(spec)
    return Custom(spec)
