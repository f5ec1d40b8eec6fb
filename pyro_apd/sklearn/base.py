# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What classifier and regressor have in common: network, sampler, posterior, and predictions by blocks of rows."""

from __future__ import annotations

import multiprocessing
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state, metadata_routing
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from pyro_apd.chains.driver import MCMC
from pyro_apd.distillation.offline import distill
from pyro_apd.kernels import MCLMC, PSGLD, SGHMC, SGLD
from pyro_apd.kernels.base import StochasticGradientKernel
from pyro_apd.kernels.recommended import Problem, recommend
from pyro_apd.models.bnn import BNN
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.predictive.draws import DrawSource
from pyro_apd.predictive.predictive import Outputs, outputs
from pyro_apd.runtime import checks
from pyro_apd.runtime.global_state import seeded
from pyro_apd.runtime.seeds import derived_seed
from pyro_apd.sklearn.inputs import Scaling, checked_inputs

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "logistic": nn.Sigmoid,
}
_KERNELS: dict[str, type[StochasticGradientKernel]] = {"sgld": SGLD, "psgld": PSGLD, "sghmc": SGHMC, "mclmc": MCLMC}
# Rows that are predicted together: with 200 networks, 13 MB for each number of a row.
_BLOCK = 8192


class BaseBNN(BaseEstimator, ABC):
    """Parameters and attributes are described in the two estimators."""

    # Not metadata of rows: it is not routed through pipelines.
    __metadata_request__fit = {"distil": metadata_routing.UNUSED}  # noqa: RUF012

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "posterior_")

    def __getstate__(self) -> dict[str, Any]:
        # A run holds the data that it was made from.
        state: dict[str, Any] = super().__getstate__()
        return {name: value for name, value in state.items() if name != "mcmc_"}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes parameters, scaling and posterior into one safetensors file, atomically.

        :param path: file to write; an existing file is replaced.
        :raises ValueError: if a parameter is no number, text, tuple or dict of these, such as a distribution.
        :raises NotFittedError: before :meth:`fit`.
        """
        from pyro_apd.sklearn import files

        check_is_fitted(self)
        files.write(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what :meth:`save` wrote. Nothing in the file is executed. ``mcmc_`` is not in it.

        :raises ArtifactError: if the file is damaged, or of another kind or estimator.
        :raises FileNotFoundError: if there is none.
        """
        from pyro_apd.sklearn import files

        estimator: Self = files.read(cls, path)
        return estimator

    @abstractmethod
    def _likelihood(self) -> tuple[str, dict[str, Any]]:
        """Name of the likelihood and its options."""

    @abstractmethod
    def _num_outputs(self) -> int:
        """Outputs of the network."""

    def _make_model(self) -> BNN:
        sizes = [self.n_features_in_, *_layer_sizes(self.hidden_layer_sizes), self._num_outputs()]
        activation = ACTIVATIONS[checks.choice("activation", self.activation, tuple(ACTIVATIONS))]
        layers: list[nn.Module] = []
        # Its values are not used, and no number is taken from the global generator for them.
        with seeded(0):
            for before, after in pairwise(sizes):
                layers += [nn.Linear(before, after), activation()]
        name, options = self._likelihood()
        return BNN(nn.Sequential(*layers[:-1]).double(), name, self.prior_scale, **options)

    def _sample(self, x: np.ndarray, y: Tensor, weights: np.ndarray | None, distil: bool) -> None:
        """Sets what a fit learns, besides the scaling of targets."""
        distil = checks.flag("distil", distil)
        checks.integer("num_networks", self.num_networks)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        progress = _is_watched() if self.progress is None else checks.flag("progress", self.progress)
        self._x_scaling = Scaling.of(x, weights)
        self._draws_seed = derived_seed(seed, "networks of predictions")
        self.model_ = self._make_model()
        data: tuple[Tensor, ...] = (torch.as_tensor(self._x_scaling.apply(x)), y)
        if weights is not None:
            data += (torch.as_tensor(weights),)
        kernel = self._make_kernel(len(x), derived_seed(seed, "chain"))
        self.mcmc_ = MCMC(
            kernel, self.num_samples, self.warmup_steps, num_chains=self.num_chains, disable_progbar=not progress
        )
        self.mcmc_.run(*data)
        self.sampler_ = type(kernel).__name__
        for name in ("posterior_", "distilled_"):
            self.__dict__.pop(name, None)
        if distil:
            seed = derived_seed(seed, "distillation")
            self.distilled_ = distill(self.mcmc_, seed=seed, storage_dtype="int8", progress=progress)
            self.posterior_: DistilledPosterior | dict[str, Tensor] = self.distilled_
        else:
            self.posterior_ = {name: value.clone() for name, value in self.mcmc_.get_samples().items()}

    def _make_kernel(self, num_rows: int, seed: int) -> StochasticGradientKernel:
        name = checks.choice("sampler", self.sampler, ("auto", *_KERNELS))
        settings: dict[str, Any] = {"thinning": self.thinning, "seed": seed}
        if self.batch_size is not None:
            settings["batch_size"] = min(checks.integer("batch_size", self.batch_size), num_rows)
        if name != "auto":
            return _KERNELS[name](self.model_, self.step_size, **settings)
        if self.step_size != "auto":
            raise ValueError(
                f"step_size={self.step_size!r} belongs to a sampler, and sampler='auto' chooses one. Choose it too: "
                f"sampler={', '.join(map(repr, _KERNELS))}."
            )
        num_weights = sum((prior.batch_shape + prior.event_shape).numel() for prior in self.model_.priors.values())
        found = recommend(Problem(num_rows, num_weights, has_batches=self.batch_size is not None))
        kernel = found.kernel(self.model_, "auto", **{**found.settings, **settings})
        kernel.reason = found.reason
        return kernel

    def _draws(self) -> DrawSource | Mapping[str, Tensor]:
        """The networks of predictions: always the same ones, so that a row's prediction does not vary."""
        if isinstance(self.posterior_, dict):
            return self.posterior_
        return self.posterior_.stream(self.num_networks, seed=self._draws_seed)

    def _blocks(self, X: Any) -> Iterator[Outputs]:
        """What each network says, for a block of rows after the other."""
        check_is_fitted(self)
        x = torch.as_tensor(self._x_scaling.apply(checked_inputs(self, X, reset=False)))
        draws = self._draws()
        for block in x.split(_BLOCK):
            yield outputs(self.model_, draws, block)


def _layer_sizes(sizes: Any) -> list[int]:
    sizes = (sizes,) if checks.is_integer(sizes) else sizes
    hint = "hidden_layer_sizes=(64, 64) are two layers of 64 units; () is a linear model."
    try:
        return [checks.integer("hidden_layer_sizes", size, hint=hint) for size in sizes]
    except TypeError as error:
        raise ValueError(f"hidden_layer_sizes={sizes!r} must be a tuple of positive integers. {hint}") from error


def _is_watched() -> bool:
    """Whether a person looks: at a terminal, or a notebook, but not one process of several."""
    if multiprocessing.parent_process() is not None:
        return False
    return "ipykernel" in sys.modules or bool(getattr(sys.stderr, "isatty", lambda: False)())
