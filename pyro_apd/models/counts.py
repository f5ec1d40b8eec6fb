# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Counts that vary more than those of a Poisson distribution."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

_MAX_RATE = 1e9


class OverdispersedPoisson(TorchDistribution):
    """The negative binomial distribution by mean m and overdispersion o: variance m + (o m)^2.

    A Gamma mixture of Poisson distributions with shape phi = 1 / o^2. In :class:`pyro.distributions.GammaPoisson` the
    log-gamma functions of a large phi cancel each other, so that little is left of the density in single precision
    where the counts are nearly Poisson. Here they are computed in double precision.

    :param torch.Tensor mean: m, positive.
    :param torch.Tensor overdispersion: o, positive.
    """

    arg_constraints = {"mean": constraints.positive, "overdispersion": constraints.positive}  # noqa: RUF012
    support = constraints.nonnegative_integer

    def __init__(self, mean: Any, overdispersion: Any, validate_args: bool | None = None) -> None:
        self._mean, self.overdispersion = broadcast_all(mean, overdispersion)
        super().__init__(self._mean.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """m."""
        mean: Tensor = self._mean
        return mean

    @property
    def variance(self) -> Tensor:
        """m + (o m)^2."""
        return self.mean + (self.overdispersion * self.mean).square()

    def expand(self, batch_shape: Any, _instance: Any = None) -> OverdispersedPoisson:
        """The same for a larger batch shape."""
        shape = torch.Size(batch_shape)
        made = OverdispersedPoisson(self.mean.expand(shape), self.overdispersion.expand(shape), validate_args=False)
        made._validate_args = self._validate_args  # as distributions of torch keep it
        return made

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Counts ``sample_shape + batch_shape``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            shape_parameter = self.overdispersion.square().reciprocal().expand(shape)
            rate = dist.Gamma(shape_parameter, shape_parameter / self.mean, validate_args=False).sample()
            # Rates that round to infinity would be refused; such counts are beyond exact integers anyway.
            return torch.poisson(rate.clamp(max=_MAX_RATE))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of counts, in the precision of the mean."""
        if self._validate_args:
            self._validate_sample(value)
        dtype = self.mean.dtype
        mean, phi = self.mean.double(), self.overdispersion.double().square().reciprocal()
        count = value.double()
        normaliser = torch.lgamma(phi + count) - torch.lgamma(phi) - torch.lgamma(count + 1)
        result: Tensor = normaliser - phi * torch.log1p(mean / phi) + torch.xlogy(count, mean / (phi + mean))
        return result.to(dtype)
