# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Small models that several test files share."""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import nn


class Conjugate:
    """Linear regression with known noise, whose posterior is a Gaussian that can be written down.

    Noise and prior sd are 1; three weights, 200 rows.
    """

    def __init__(self, num_data=200, temperature=1.0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(num_data, 3, generator=generator, dtype=dtype)
        noise = torch.randn(num_data, generator=generator, dtype=dtype)
        self.y = self.x @ torch.tensor([1.0, -1.0, 0.5], dtype=dtype) + noise
        precision = self.x.T @ self.x + torch.eye(3, dtype=dtype)
        self.covariance = temperature * torch.linalg.inv(precision)
        self.mean = torch.linalg.solve(precision, self.x.T @ self.y)
        self.largest_curvature = float(torch.linalg.eigvalsh(precision)[-1])

    def weights(self):
        return pyro.sample("w", dist.Normal(torch.zeros(3).to(self.x), 1.0).to_event(1))

    def full(self, x, y=None):
        """As for full-batch NUTS."""
        w = self.weights()
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    def subsampling(self, x, y):
        """Subsamples itself."""
        w = self.weights()
        with pyro.plate("data", len(x), subsample_size=50):
            batch, target = pyro.subsample(x, event_dim=1), pyro.subsample(y, event_dim=0)
            pyro.sample("obs", dist.Normal(batch @ w, 1.0), obs=target)

    def stating_size(self, x, y):
        """Fed batches, and told the size of the data by its plate."""
        w = self.weights()
        with pyro.plate("data", len(self.x), subsample_size=len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    def without_plate(self, x, y):
        """One multivariate observation."""
        pyro.sample("obs", dist.Normal(x @ self.weights(), 1.0).to_event(1), obs=y)


class Classifier(PyroModule):
    """An unmodified nn.Linear network with PyroSample weights."""

    def __init__(self, sizes=(4, 6, 3), scale=0.5, is_net_inside=False):
        super().__init__()
        self.first = PyroModule[nn.Linear](sizes[0], sizes[1])
        self.second = PyroModule[nn.Linear](sizes[1], sizes[2])
        self.is_net_inside = is_net_inside
        for layer in (self.first, self.second):
            for name, parameter in list(layer.named_parameters()):
                prior = dist.Normal(0.0, scale).expand(parameter.shape).to_event(parameter.dim())
                setattr(layer, name, PyroSample(prior))

    def network(self, x):
        return self.second(torch.relu(self.first(x)))

    def forward(self, x, y=None):
        logits = None if self.is_net_inside else self.network(x)
        with pyro.plate("data", len(x)):
            logits = self.network(x) if logits is None else logits
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)
        return logits


#: Of :func:`badly_scaled`.
SDS = torch.logspace(0, -2, 10)
MEAN = torch.linspace(-1, 1, 10) * SDS


def badly_scaled():
    """Ten independent normal latents, of condition number 10,000."""
    pyro.sample("w", dist.Normal(MEAN, SDS).to_event(1))


def constrained(y):
    """Latents on three kinds of constrained supports; one of them has a discrete-looking shape of its own."""
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    mix = pyro.sample("mix", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
    corr = pyro.sample("corr", dist.LKJCholesky(2, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mix[..., 0] + corr[..., 1, 0], scale), obs=y)


def null():
    """No latents at all."""
