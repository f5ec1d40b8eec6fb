# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A regressor: means, standard deviations, intervals and quantiles of what is observed, and their two sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import RegressorMixin
from sklearn.utils import check_random_state
from torch import Tensor

from pyro_apd.runtime import checks
from pyro_apd.sklearn.base import BaseBNN
from pyro_apd.sklearn.inputs import Scaling, checked_inputs, checked_weights
from pyro_apd.sklearn.mixtures import mixture_quantiles

_NOISE = {"constant": "gaussian", "by_input": "gaussian_by_input", "by input": "gaussian_by_input"}


class BNNRegressor(RegressorMixin, BaseBNN):
    """A Bayesian neural network for one or several real targets: a posterior over its weights, by MCMC.

    Inputs and targets are standardised inside; predictions are in the targets' unit. Missing values are refused.

    :param tuple hidden_layer_sizes: units of each hidden layer; ``()`` is a linear model.
    :param str activation: ``"tanh"``, ``"relu"``, ``"silu"``, ``"gelu"`` or ``"logistic"``.
    :param prior_scale: prior of the weights, as in :class:`~pyro_apd.BNN`; inputs are standardised.
    :param str noise: ``"constant"``: one standard deviation for all rows, learned; ``"by_input"``: it depends on the
        inputs, as a further output of the network.
    :param str sampler: ``"auto"`` for the kernel that :func:`~pyro_apd.recommended_kernel` takes, or ``"sgld"``,
        ``"psgld"``, ``"sghmc"``, ``"mclmc"``.
    :param step_size: of the sampler; ``"auto"`` finds it in warm-up.
    :param int batch_size: rows per step; None leaves it to the sampler, which takes all rows where it can.
    :param int num_samples: draws per chain that are kept, and ``warmup_steps`` draws before them.
    :param int num_chains: chains, advanced together.
    :param int thinning: steps per draw.
    :param int num_networks: networks that the generator draws for a prediction, the same for all.
    :param bool progress: whether to show progress bars; None shows them in a terminal or notebook only.
    :param random_state: as everywhere in scikit-learn; an integer makes fits reproducible.
    :ivar DistilledPosterior distilled_: the generator, after ``fit(distil=True)``; predictions come from it.
    :ivar posterior_: the same, or after ``fit(distil=False)`` the draws of the chain by site.
    :ivar BNN model_: the Pyro model, of standardised inputs and targets, and :ivar MCMC mcmc_: the run; both serve the
        rest of the library. ``mcmc_`` is left out of pickles and files.

    Example::

        regressor = BNNRegressor(noise="by_input", random_state=0).fit(X_train, y_train)
        mean, interval = regressor.predict(X_test, return_interval=0.9)   # interval[:, 0] to interval[:, 1]
    """

    def __init__(
        self,
        hidden_layer_sizes: Any = (32,),
        activation: str = "tanh",
        *,
        prior_scale: Any = "fan_in",
        noise: str = "constant",
        sampler: str = "auto",
        step_size: Any = "auto",
        batch_size: int | None = None,
        num_samples: int = 100,
        warmup_steps: int = 50,
        num_chains: int = 4,
        thinning: int = 10,
        num_networks: int = 200,
        progress: bool | None = None,
        random_state: Any = None,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.prior_scale = prior_scale
        self.noise = noise
        self.sampler = sampler
        self.step_size = step_size
        self.batch_size = batch_size
        self.num_samples = num_samples
        self.warmup_steps = warmup_steps
        self.num_chains = num_chains
        self.thinning = thinning
        self.num_networks = num_networks
        self.progress = progress
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None, *, distil: bool = True) -> Self:
        """Samples the posterior, and distils it.

        :param X: numbers ``(N, D)``: an array, or a frame of pandas or polars.
        :param y: targets ``(N,)`` or ``(N, K)``.
        :param sample_weight: factors of the log-likelihood of the rows, ``(N,)``, 0 or more.
        :param bool distil: whether to fit a generator to the draws, from which predictions are made.
        :raises ValueError: if data or parameters are not as described; missing values are named.
        """
        X, y = checked_inputs(self, X, y, reset=True, multi_output=True, y_numeric=True)
        weights = checked_weights(sample_weight, len(X))
        y = np.asarray(y, dtype=np.float64)
        self._target_shape = y.shape[1:]
        columns = y.reshape(len(y), -1)
        self._y_scaling = Scaling.of(columns, weights)
        self._sample(X, torch.as_tensor(self._y_scaling.apply(columns)), weights, distil)
        return self

    def predict(
        self,
        X: Any,
        return_std: bool = False,
        return_interval: float | None = None,
        return_quantiles: Sequence[float] | None = None,
    ) -> Any:
        """Predictive means ``(N,)``, or ``(N, K)`` of K targets; with what is asked for besides, a tuple.

        Intervals and quantiles are of observations, noise included, and exact for the mixture over networks.

        :param bool return_std: also the predictive standard deviation, shaped as the mean.
        :param float return_interval: also the central interval of this probability, ``(..., 2)``: ``0.9`` is from the
            quantile .05 to .95.
        :param return_quantiles: also the quantiles of these Q levels, ``(..., Q)``.
        :returns: the mean; or mean, std, interval and quantiles, those that were asked for in this order.
        :raises ValueError: if a probability is not between 0 and 1, or ``X`` has other columns than in :meth:`fit`, or
            missing values.
        :raises NotFittedError: before :meth:`fit`.
        """
        levels = _interval_levels(return_interval) + _quantile_levels(return_quantiles)
        parts = []
        for mean_SNK, variance_SNK in self._moments(X):
            mean_NK = mean_SNK.mean(0)
            sd_NK = (variance_SNK.mean(0) + mean_SNK.var(0, unbiased=False)).sqrt()
            shape = mean_SNK.shape
            flat = (mean_SNK.reshape(shape[0], -1), variance_SNK.sqrt().reshape(shape[0], -1))
            quantiles = mixture_quantiles(*flat, levels).reshape(-1, *shape[1:]) if levels else mean_SNK[:0]
            parts.append((mean_NK, sd_NK, quantiles.movedim(0, -1)))
        mean, sd, quantiles = (torch.cat(column) for column in zip(*parts, strict=True))
        shift, factor = torch.as_tensor(self._y_scaling.mean), torch.as_tensor(self._y_scaling.scale)
        found = [self._shaped(shift + factor * mean)]
        quantiles = shift.unsqueeze(-1) + factor.unsqueeze(-1) * quantiles
        if return_std:
            found.append(self._shaped(factor * sd))
        if return_interval is not None:
            found.append(self._shaped(quantiles[..., :2]))
        if return_quantiles is not None:
            found.append(self._shaped(quantiles[..., 0 if return_interval is None else 2 :]))
        return found[0] if len(found) == 1 else tuple(found)

    def predict_uncertainty(self, X: Any) -> dict[str, np.ndarray]:
        """Standard deviations of the prediction by source, by name, shaped as the mean.

        ``"epistemic_std"`` is from not knowing the weights, ``"aleatoric_std"`` from noise, and ``"std"`` the root of
        the sum of their squares.

        Errors as :meth:`predict`.
        """
        parts = [(m.var(0, unbiased=False), v.mean(0)) for m, v in self._moments(X)]
        epistemic, aleatoric = (torch.cat(column) for column in zip(*parts, strict=True))
        factor = torch.as_tensor(self._y_scaling.scale)
        found = {"std": epistemic + aleatoric, "epistemic_std": epistemic, "aleatoric_std": aleatoric}
        return {name: self._shaped(factor * variance.sqrt()) for name, variance in found.items()}

    def sample_y(self, X: Any, n_samples: int = 1, random_state: Any = 0) -> np.ndarray:
        """Observations from the posterior predictive distribution, ``(N, n_samples)`` or ``(N, K, n_samples)``.

        Sample j of all rows is of one network, drawn with replacement.

        :param int n_samples: samples of each row.
        :param random_state: makes them reproducible.
        :raises ValueError: if ``n_samples`` is not positive; else as :meth:`predict`.
        """
        n_samples, random = checks.integer("n_samples", n_samples), check_random_state(random_state)
        parts, chosen = [], None
        for mean_SNK, variance_SNK in self._moments(X):
            chosen = random.randint(len(mean_SNK), size=n_samples) if chosen is None else chosen
            mean, sd = mean_SNK[chosen], variance_SNK[chosen].sqrt()
            parts.append(mean + sd * torch.as_tensor(random.standard_normal(tuple(mean.shape))))
        shift, factor = torch.as_tensor(self._y_scaling.mean), torch.as_tensor(self._y_scaling.scale)
        return self._shaped((shift + factor * torch.cat(parts, dim=1)).movedim(0, -1))

    def _moments(self, X: Any) -> Any:
        """Means and variances of standardised targets under each network, ``(S, N, K)``, by blocks of rows."""
        for block in self._blocks(X):
            assert block.mean_SN is not None
            assert block.variance_SN is not None
            shape = (len(block.mean_SN), -1, len(self._y_scaling.mean))
            yield block.mean_SN.reshape(shape), block.variance_SN.reshape(shape)

    def _shaped(self, values: Tensor) -> np.ndarray:
        """Without the dimension of targets, ``(N, K, ...)``, where fit had none."""
        array: np.ndarray = (values if self._target_shape else values.squeeze(1)).numpy()
        return array

    def _likelihood(self) -> tuple[str, dict[str, Any]]:
        return _NOISE[checks.choice("noise", self.noise, tuple(_NOISE))], {}

    def _num_outputs(self) -> int:
        return len(self._y_scaling.mean) * (1 if self._likelihood()[0] == "gaussian" else 2)


def _interval_levels(probability: float | None) -> list[float]:
    if probability is None:
        return []
    hint = "0.9 is the interval that holds nine of ten observations."
    probability = checks.number("return_interval", probability, above=0, below=1, hint=hint)
    return [0.5 - probability / 2, 0.5 + probability / 2]


def _quantile_levels(levels: Sequence[float] | None) -> list[float]:
    if levels is None:
        return []
    if isinstance(levels, (float, int)):
        raise ValueError(f"return_quantiles={levels!r} must be a list of levels; write [{levels!r}].")
    return [checks.number("return_quantiles", level, above=0, below=1) for level in levels]
