# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Methods that are compared on the last layer of a sentence encoder. Each gives mean probabilities and mutual
information for features; hyperparameters come from grids, and validation rows choose among them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyro_apd as apd
from benchmarks.last_layer_data import Queries

#: From features ``(N, F)`` to mean probabilities ``(N, K)`` and mutual information ``(N,)``.
Predictor = Callable[[Tensor], tuple[Tensor, Tensor]]

NUM_CLASSES = 150
# Prior standard deviations; a weight decay of 1 / (N sd^2).
SCALES = (0.07, 0.1, 0.15, 0.2, 0.3)
ENSEMBLE_SCALES = (0.1, 0.2, 0.3)
DROPOUT = (0.1, 0.3, 0.5)
_STEPS, _BATCH, _RATE = 1000, 500, 1e-2
_LAPLACE_DRAWS, _DROPOUT_DRAWS, _MEMBERS = 100, 30, 5
#: The chain: two chains of draws, 20 steps of 250 rows each.
CHAIN_SCALES = (0.1, 0.14, 0.2)
_CHAIN = {"batch_size": 250, "thinning": 20, "warm_start": 500, "compile": False}  # a step is two matrix products
_DRAWS, _WARMUP = 160, 54
# Draws by which chain and generator are evaluated.
_EVALUATED = 160


@dataclass
class Fit:
    """One method with one setting.

    :ivar predict: its predictions.
    :ivar dict notes: what else is reported of it.
    """

    predict: Predictor
    notes: dict[str, Any] = field(default_factory=dict)


def of_draws(draws: Mapping[str, Tensor]) -> Predictor:
    """Predictions of linear layers ``weight`` ``(S, K, F)`` and ``bias`` ``(S, K)``."""

    def predict(x_NF: Tensor) -> tuple[Tensor, Tensor]:
        mean_NK, entropy_N = torch.zeros(len(x_NF), NUM_CLASSES), torch.zeros(len(x_NF))
        for weight_KF, bias_K in zip(draws["weight"], draws["bias"], strict=True):
            log_NK = F.linear(x_NF, weight_KF, bias_K).log_softmax(-1)
            mean_NK += log_NK.exp() / len(draws["weight"])
            entropy_N -= (log_NK.exp() * log_NK).sum(-1) / len(draws["weight"])
        return mean_NK, apd.uncertainty.predictive_entropy(mean_NK.unsqueeze(0)) - entropy_N

    return predict


def map_layer(train: Queries, scale: float, seed: int, dropout: float = 0.0, resample: bool = False) -> nn.Linear:
    """The maximum a posteriori by Adam with a cosine schedule.

    :param float dropout: of the features.
    :param bool resample: train on a bootstrap sample of the rows.
    """
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(train.x_NF.shape[1], NUM_CLASSES)
    with torch.no_grad():
        for value in layer.parameters():
            value.normal_(0.0, 0.02, generator=generator)
    rows_N = torch.arange(len(train.x_NF))
    if resample:
        rows_N = torch.randint(len(rows_N), rows_N.shape, generator=generator)
    optimiser = torch.optim.Adam(layer.parameters(), _RATE)
    for step in range(_STEPS):
        optimiser.param_groups[0]["lr"] = _RATE * 0.5 * (1 + math.cos(math.pi * step / _STEPS))
        batch_B = rows_N[torch.randint(len(rows_N), (_BATCH,), generator=generator)]
        x_BF = train.x_NF[batch_B]
        if dropout:
            keep_BF = torch.rand(x_BF.shape, generator=generator) >= dropout
            x_BF = x_BF * keep_BF / (1 - dropout)
        penalty = sum(value.square().sum() for value in layer.parameters()) / (2 * scale**2 * len(rows_N))
        loss = F.cross_entropy(layer(x_BF), train.y_N[batch_B]) + penalty
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return layer.requires_grad_(False)


def maximum(train: Queries, seed: int) -> Iterator[tuple[str, Fit]]:
    """MAP by weight decay."""
    for scale in SCALES:
        layer = map_layer(train, scale, seed)
        draws = {"weight": layer.weight.unsqueeze(0), "bias": layer.bias.unsqueeze(0)}
        yield f"sd {scale}", Fit(of_draws(draws))


def ensemble(train: Queries, seed: int) -> Iterator[tuple[str, Fit]]:
    """Five MAP layers, each on a bootstrap sample: from other starts alone all would find the same one."""
    for scale in ENSEMBLE_SCALES:
        layers = [map_layer(train, scale, 10 * seed + member, resample=True) for member in range(_MEMBERS)]
        weight_SKF = torch.stack([layer.weight for layer in layers])
        yield f"sd {scale}", Fit(of_draws({"weight": weight_SKF, "bias": torch.stack([la.bias for la in layers])}))


def mc_dropout(train: Queries, seed: int) -> Iterator[tuple[str, Fit]]:
    """Dropout of features, in training and prediction."""
    for rate in DROPOUT:
        layer = map_layer(train, 0.2, seed, dropout=rate)

        def predict(x_NF: Tensor, layer: nn.Linear = layer, rate: float = rate) -> tuple[Tensor, Tensor]:
            generator = torch.Generator().manual_seed(seed)
            probs = []
            for _ in range(_DROPOUT_DRAWS):
                keep_NF = torch.rand(x_NF.shape, generator=generator) >= rate
                probs.append(layer(x_NF * keep_NF / (1 - rate)).softmax(-1))
            probs_SNK = torch.stack(probs)
            return probs_SNK.mean(0), apd.uncertainty.mutual_information(probs_SNK)

        yield f"rate {rate}", Fit(predict)


def laplace(train: Queries, seed: int) -> Iterator[tuple[str, Fit]]:
    """Last-layer Laplace with the Kronecker-factored Gauss-Newton matrix (Ritter et al., 2018), exact factors."""
    x_NI = torch.cat([train.x_NF, torch.ones(len(train.x_NF), 1)], 1)
    value_I, vector_II = torch.linalg.eigh((x_NI.mT @ x_NI).double())
    for scale in SCALES:
        layer = map_layer(train, scale, seed)
        probs_NK = layer(train.x_NF).softmax(-1)
        hessian_KK = torch.diag(probs_NK.mean(0)) - probs_NK.mT @ probs_NK / len(probs_NK)
        value_K, vector_KK = torch.linalg.eigh(hessian_KK.double())
        deviation_KI = (torch.outer(value_K.clamp_min(0), value_I.clamp_min(0)) + scale**-2).rsqrt().float()
        generator = torch.Generator().manual_seed(seed)
        noise_SKI = torch.randn(_LAPLACE_DRAWS, *deviation_KI.shape, generator=generator) * deviation_KI
        change_SKI = vector_KK.float() @ noise_SKI @ vector_II.float().mT
        draws = {"weight": layer.weight + change_SKI[..., :-1], "bias": layer.bias + change_SKI[..., -1]}
        yield f"sd {scale}", Fit(of_draws(draws))


def chain(train: Queries, net: nn.Module, scale: float, seed: int, cpu: Callable[[], float]) -> tuple[Any, Any, Fit]:
    """Draws of this package's kernel on the last layer of ``net``, from features on disk."""
    start = cpu()
    bnn = apd.BNN(net, prior_scale=scale, bayesian="last_layer")
    kernel = apd.SGLD(bnn, "auto", seed=seed, **_CHAIN)
    settings = {"num_chains": 2, "chain_method": "vectorized", "disable_progbar": True}
    mcmc = apd.MCMC(kernel, num_samples=_DRAWS, warmup_steps=_WARMUP, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mcmc.run(features=train.x_NF, y=train.y_N)
    notes = {"cpu_seconds": cpu() - start, "warnings": [str(warning.message)[:200] for warning in caught]}
    step = -(-2 * _DRAWS // _EVALUATED)
    draws = {name: value[::step] for name, value in mcmc.get_samples().items()}
    return bnn, mcmc, Fit(of_sites(bnn, draws), notes)


def of_sites(bnn: apd.BNN, samples: Mapping[str, Tensor]) -> Predictor:
    """Predictions of draws by site, by this package."""

    def predict(x_NF: Tensor) -> tuple[Tensor, Tensor]:
        names = ("mean_probability", "mutual_information")
        found = apd.reduce_outputs(bnn, samples, names=names, features=x_NF)
        return found["mean_probability"], found["mutual_information"]

    return predict


def generator(bnn: apd.BNN, mcmc: Any, seed: int, budget: float, path: Path, cpu: Callable[[], float]) -> Fit:
    """The generator of the chain, saved in a file of at most ``budget`` networks of the Bayesian part."""
    start = cpu()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = apd.distill(mcmc, byte_budget=budget, seed=seed, progress=False)
    posterior.save(path)
    size = sum(math.prod(site.shape) for site in posterior.layout) * 4
    notes = {
        "cpu_seconds": cpu() - start,
        "networks": path.stat().st_size / size,
        "warnings": [str(warning.message)[:200] for warning in caught],
    }
    draws = posterior.get_samples(_EVALUATED, seed=seed)
    return Fit(of_sites(bnn, draws), notes)
