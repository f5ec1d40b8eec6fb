# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Tables, networks and metrics of :mod:`benchmarks.tabular` and :mod:`benchmarks.default_prior`.

Regressions are the published splits of four UCI sets; their networks have two outputs, a mean and a scale
softplus(.) + 1e-6, so that the noise may differ by input: the model of ``sklearn-contrib-bde``. Classifications are
digits, breast cancer and wine of scikit-learn, a fifth of the rows for testing. Inputs, and targets of regressions, are
standardised by the training rows.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import softplus

import pyro_apd as apd
from pyro_apd.metrics import accuracy, expected_calibration_error, negative_log_likelihood
from pyro_apd.models.priors import PriorSpec

DATA = Path(os.environ.get("PYRO_APD_DATA", "../shared/data"))
REGRESSIONS = ("yacht", "energy", "concrete", "wine-quality-red")
CLASSIFICATIONS = ("digits", "breast cancer", "wine")
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
#: As that of ``sklearn-contrib-bde``.
SMALLEST_SCALE = 1e-6


@dataclass(frozen=True)
class Table:
    """Rows to train on and rows to test on, standardised.

    :ivar Tensor x: inputs ``(N, F)``; targets ``y`` ``(N,)``; ``x_test`` and ``y_test`` likewise.
    :ivar int num_classes: 0 for a regression.
    :ivar float unit: sd of the targets of a regression, in their own unit.
    """

    name: str
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int = 0
    unit: float = 1.0

    @property
    def num_outputs(self) -> int:
        """A mean and a scale, or logits."""
        return self.num_classes or 2

    def inner(self, seed: int, share: float = 0.15) -> Table:
        """A split of the training rows, for choosing settings: the test rows are not in it."""
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed))
        held_out, kept = order[: round(share * len(order))], order[round(share * len(order)) :]
        return replace(self, x=self.x[kept], y=self.y[kept], x_test=self.x[held_out], y_test=self.y[held_out])


def load(name: str, split: int) -> Table:
    """A split of one of :data:`REGRESSIONS` or :data:`CLASSIFICATIONS`."""
    return _regression(name, split) if name in REGRESSIONS else _classification(name, split)


def _regression(name: str, split: int) -> Table:
    table = np.loadtxt(DATA / "uci" / f"{name}.txt")
    state = np.random.RandomState(1)
    for _ in range(split + 1):
        order = state.choice(range(len(table)), len(table), replace=False)
    train, test = np.split(table[order], [round(0.9 * len(table))])
    unit = float(train[:, -1].std())
    return standardised(Table(name, *_columns(train), *_columns(test), unit=unit))


def _classification(name: str, split: int) -> Table:
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    loaders = {"digits": datasets.load_digits, "breast cancer": datasets.load_breast_cancer, "wine": datasets.load_wine}
    x, y = loaders[name](return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, random_state=split, stratify=y)
    rows = (torch.as_tensor(part) for part in (x_train, y_train, x_test, y_test))
    return standardised(Table(name, *rows, num_classes=int(y.max()) + 1))


def _columns(table: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.as_tensor(table[:, :-1]), torch.as_tensor(table[:, -1])


def standardised(table: Table) -> Table:
    """By the mean and sd of the training rows; columns that are constant there become 0."""

    def scaled(train: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        mean, sd = train.double().mean(0), train.double().std(0, correction=0)
        return tuple(((part - mean) / torch.where(sd > 0, sd, 1.0)).float() for part in parts)

    x, x_test = scaled(table.x, table.x, table.x_test)
    y, y_test = (table.y, table.y_test) if table.num_classes else scaled(table.y, table.y, table.y_test)
    return replace(table, x=x, y=y, x_test=x_test, y_test=y_test)


class NoiseByInput(PyroModule):
    """A regression whose network gives a mean and a scale for each row, with the priors of :class:`pyro_apd.BNN`."""

    def __init__(self, net: nn.Module, prior_scale: PriorSpec) -> None:
        super().__init__()
        bnn = apd.BNN(net, likelihood="gaussian", prior_scale=prior_scale, noise_scale=1.0)
        self.net, self.priors = bnn.net, bnn.priors

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Outputs ``(N, 2)``: means, and scales before softplus."""
        drawn = {site.removeprefix("net."): pyro.sample(site, prior) for site, prior in self.priors.items()}
        outputs: Tensor = torch.func.functional_call(self.net, drawn, (x,))
        mean, raw = outputs.unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, softplus(raw) + SMALLEST_SCALE), obs=y)
        return outputs


def network(sizes: tuple[int, ...], activation: str = "relu") -> nn.Sequential:
    """A fully connected network with so many units per layer, inputs and outputs included."""
    layers: list[nn.Module] = []
    for num_in, num_out in itertools.pairwise(sizes):
        layers += [nn.Linear(num_in, num_out), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def make_model(
    table: Table, hidden: tuple[int, ...] = (50,), activation: str = "relu", prior_scale: PriorSpec | None = None
) -> apd.BNN | NoiseByInput:
    """The Bayesian network of a table; ``prior_scale`` None is the default of :class:`pyro_apd.BNN`."""
    net = network((table.x.shape[1], *hidden, table.num_outputs), activation)
    settings = {} if prior_scale is None else {"prior_scale": prior_scale}
    if table.num_classes:
        return apd.BNN(net, "categorical", **settings)
    return NoiseByInput(net, 1.0 if prior_scale is None else prior_scale)


def network_outputs(model: apd.BNN | NoiseByInput, draws: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Outputs ``(S, N, K)`` of the network for draws ``(S, ...)`` by site."""
    params = {site.removeprefix("net."): value for site, value in draws.items()}
    with torch.no_grad():
        return torch.vmap(lambda values: torch.func.functional_call(model.net, values, (x,)), chunk_size=500)(params)


def metrics(table: Table, outputs_SNK: Tensor) -> dict[str, float]:
    """Of the mixture over draws on the test rows: of regressions in the unit of the targets."""
    outputs_SNK = outputs_SNK.double()
    if table.num_classes:
        probs_NK = outputs_SNK.softmax(-1).mean(0)
        return {
            "log_likelihood": -negative_log_likelihood(probs_NK, table.y_test),
            "accuracy": accuracy(probs_NK, table.y_test),
            "ece": expected_calibration_error(probs_NK, table.y_test),
        }
    mean_SN, raw_SN = outputs_SNK.unbind(-1)
    log_prob_SN = dist.Normal(mean_SN, softplus(raw_SN) + SMALLEST_SCALE).log_prob(table.y_test)
    log_mean_N = log_prob_SN.logsumexp(0) - math.log(len(log_prob_SN))
    error_N = mean_SN.mean(0) - table.y_test
    return {
        "log_likelihood": float(log_mean_N.mean()) - math.log(table.unit),
        "rmse": table.unit * float(error_N.square().mean().sqrt()),
    }
