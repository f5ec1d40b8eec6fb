# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Five posteriors of posteriordb as Pyro models, their data, reference draws, and standardised coordinates for them.

Data and draws are of posteriordb (Stan developers, BSD-3), in the folder ``posteriordb`` of ``PYRO_APD_DATA``. The
densities are those of Stan's programs up to a constant.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions import transforms as T
from pyro.infer.reparam.reparam import Reparam
from torch import Tensor

# -- models -----------------------------------------------------------------------------------------------------------


def blr(x: Tensor, y: Tensor) -> None:
    """``sblrc-blr``: linear regression without intercept, proper priors."""
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(x.new_tensor(10.0)))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ beta, sigma), obs=y)


def kidscore(x: Tensor, y: Tensor) -> None:
    """``kidscore_momiq``: flat priors on intercept and slope."""
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    sigma = pyro.sample("sigma", dist.HalfCauchy(x.new_tensor(2.5)))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(beta[0] + beta[1] * x, sigma), obs=y)


def logearn(x: Tensor, y: Tensor) -> None:
    """``logearn_height``: flat priors, sigma on the positive half-line."""
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(beta[0] + beta[1] * x, sigma), obs=y)


def autoregression(lagged: Tensor, y: Tensor) -> None:
    """``arK``, given its first K values; row t of ``lagged`` ``(T - K, K)`` holds y one to K steps back."""
    alpha = pyro.sample("alpha", dist.Normal(y.new_zeros(()), 10.0))
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(lagged.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(alpha + lagged @ beta, sigma), obs=y)


def eight_schools(y: Tensor, sd: Tensor) -> None:
    """``eight_schools_noncentered``."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    effect = pyro.sample("theta_trans", dist.Normal(y.new_zeros(len(y)), 1.0).to_event(1))
    with pyro.plate("schools", len(y)):
        pyro.sample("obs", dist.Normal(mu + tau * effect, sd), obs=y)


# -- standardised coordinates -----------------------------------------------------------------------------------------


class Standardise(Reparam):
    """Samples ``NAME_std`` in place of a site, with ``site = transform(NAME_std)``; the prior keeps its density.

    :param transform: from standardised to the site's own values, bijective.
    """

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def apply(self, msg: Any) -> Any:
        """Replaces the site by a deterministic function of the standardised one."""
        prior = dist.TransformedDistribution(msg["fn"], [self.transform.inv])
        value = msg["value"]  # given when a chain is initialised
        start = None if value is None else self.transform.inv(value)
        standard = pyro.sample(f"{msg['name']}_std", prior, obs=start, infer={"is_observed": msg["is_observed"]})
        value = self.transform(standard) if value is None else value
        return {"fn": dist.Delta(value, event_dim=msg["fn"].event_dim).mask(False), "value": value, "is_observed": True}


def of_least_squares(x: Tensor, y: Tensor) -> dict[str, Any]:
    """Transforms for the coefficients and the noise sd of a regression, from its least-squares fit.

    Standardised coefficients have about unit posterior covariance, and so has sqrt(2 N) log(sigma / fitted sigma).
    """
    fit, noise, scale_tril = _fit(x, y)
    log_sigma = T.AffineTransform(noise.log(), math.sqrt(0.5 / len(y)))
    return {"beta": T.LowerCholeskyAffine(fit, scale_tril), "sigma": T.ComposeTransform([log_sigma, T.ExpTransform()])}


def _fit(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares: coefficients, noise sd, Cholesky factor of the coefficients' covariance."""
    fit = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    noise = ((y - x @ fit).square().sum() / (len(y) - x.shape[1])).sqrt()
    return fit, noise, noise * torch.linalg.cholesky(torch.linalg.inv(x.T @ x))


def _loc(transform: Any) -> Tensor:
    first = transform.parts[0] if isinstance(transform, T.ComposeTransform) else transform
    return first.loc


def _with_ones(x: Tensor) -> Tensor:
    return torch.stack([torch.ones_like(x), x], -1)


def _autoregression_transforms(lagged: Tensor, y: Tensor) -> dict[str, Any]:
    fit, _, scale_tril = _fit(torch.cat([torch.ones_like(lagged[:, :1]), lagged], -1), y)
    covariance = scale_tril @ scale_tril.T
    beta = T.LowerCholeskyAffine(fit[1:], torch.linalg.cholesky(covariance[1:, 1:]))
    return {
        **of_least_squares(lagged, y),
        "alpha": T.AffineTransform(fit[0], covariance[0, 0].sqrt()),
        "beta": beta,
    }


def _eight_schools_transforms(y: Tensor, sd: Tensor) -> dict[str, Any]:
    """The overall mean as if schools did not differ; the other sites are already standardised."""
    precision = sd.square().reciprocal().sum() + 1 / 25
    return {"mu": T.AffineTransform((y / sd.square()).sum() / precision, precision.rsqrt())}


# -- posteriors -------------------------------------------------------------------------------------------------------


def _regression_data(x: str, y: str) -> Callable[[Mapping[str, Any]], tuple[Tensor, ...]]:
    return lambda data: (torch.tensor(data[x]).double(), torch.tensor(data[y]).double())


def _autoregression_data(data: Mapping[str, Any]) -> tuple[Tensor, ...]:
    y, lags = torch.tensor(data["y"]).double(), int(data["K"])
    return torch.stack([y[lags - k : len(y) - k] for k in range(1, lags + 1)], -1), y[lags:]


def _earnings_data(data: Mapping[str, Any]) -> tuple[Tensor, ...]:
    return torch.tensor(data["height"]).double(), torch.tensor(data["earn"]).double().log()


def _by_name(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Draws ``(S, ...)`` by site as scalars ``(S,)`` by Stan's names, counted from 1."""
    scalars = {}
    for name, value in values.items():
        if value.dim() == 1:
            scalars[name] = value
        else:
            scalars.update({f"{name}[{i + 1}]": column for i, column in enumerate(value.T)})
    return scalars


def _schools_by_name(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    theta = values["mu"][:, None] + values["tau"][:, None] * values["theta_trans"]
    return _by_name({"theta": theta, "mu": values["mu"], "tau": values["tau"]})


@dataclass(frozen=True)
class Posterior:
    """One of the five.

    :ivar str name: of its file of draws.
    :ivar str data: of its file of data.
    :ivar model: the Pyro model.
    :ivar arguments: from the file's dict to the model's arguments, float64.
    :ivar transforms: from the arguments to a standardising transform by site.
    :ivar by_name: from draws by site to scalars by the reference's names.
    """

    name: str
    data: str
    model: Callable[..., None]
    arguments: Callable[[Mapping[str, Any]], tuple[Tensor, ...]]
    transforms: Callable[..., dict[str, Any]]
    by_name: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = field(default=_by_name)

    def start(self, args: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Values by site in the middle of the standardising transforms; a flat prior has no draws."""
        return {
            name: transform(torch.zeros_like(_loc(transform))) for name, transform in self.transforms(*args).items()
        }

    def standardised(self, args: tuple[Tensor, ...]) -> Callable[..., Any]:
        """The model in standardised coordinates, the same distribution of its sites."""
        config = {name: Standardise(transform) for name, transform in self.transforms(*args).items()}
        return poutine.reparam(self.model, config=config)

    def scalars(self, draws: Mapping[str, Tensor], args: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Draws ``(S, ...)`` by sampled site, of either coordinates, as scalars ``(S,)`` by the reference's names."""
        values = dict(draws)
        for name, transform in self.transforms(*args).items():
            if f"{name}_std" in values:
                values[name] = transform(values.pop(f"{name}_std"))
        return self.by_name(values)


POSTERIORS = {
    "sblrc": Posterior("sblrc-blr", "sblrc", blr, _regression_data("X", "y"), of_least_squares),
    "kidiq": Posterior(
        "kidiq-kidscore_momiq",
        "kidiq",
        kidscore,
        _regression_data("mom_iq", "kid_score"),
        lambda x, y: of_least_squares(_with_ones(x), y),
    ),
    "eight_schools": Posterior(
        "eight_schools-eight_schools_noncentered",
        "eight_schools",
        eight_schools,
        _regression_data("y", "sigma"),
        _eight_schools_transforms,
        _schools_by_name,
    ),
    "arK": Posterior("arK-arK", "arK", autoregression, _autoregression_data, _autoregression_transforms),
    "earnings": Posterior(
        "earnings-logearn_height",
        "earnings",
        logearn,
        _earnings_data,
        lambda x, y: of_least_squares(_with_ones(x), y),
    ),
}
#: Rows per mini-batch, if there are enough data.
BATCHES = {"kidiq": 109, "earnings": 298}


def data_folder() -> Path:
    """``posteriordb`` under ``PYRO_APD_DATA``, which is by default ``../shared/data`` beside the checkout.

    :raises FileNotFoundError: if it is not there.
    """
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PYRO_APD_DATA", default)) / "posteriordb"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; set PYRO_APD_DATA to the folder that holds posteriordb/.")
    return folder


def _read(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(archive.namelist()[0]))


def arguments(folder: Path, posterior: Posterior) -> tuple[Tensor, ...]:
    """The model's arguments, float64."""
    return posterior.arguments(_read(folder / f"{posterior.data}.data.json.zip"))


def reference(folder: Path, posterior: Posterior) -> dict[str, Tensor]:
    """Gold-standard draws ``(10, 1000)`` by scalar parameter."""
    chains = _read(folder / f"{posterior.name}.draws.json.zip")
    return {name: torch.tensor([chain[name] for chain in chains]).double() for name in chains[0]}
