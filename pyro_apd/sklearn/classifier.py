# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A classifier: labels of any kind, probabilities averaged over networks, and how much the networks disagree."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets

from pyro_apd.sklearn.base import BaseBNN
from pyro_apd.sklearn.inputs import checked_inputs, checked_weights
from pyro_apd.uncertainty import mutual_information, predictive_entropy


class BNNClassifier(ClassifierMixin, BaseBNN):
    """A Bayesian neural network for classes: a posterior over its weights, by MCMC, in place of one best network.

    Inputs are standardised inside. Labels may be numbers, text or booleans. Missing values are refused.

    :param tuple hidden_layer_sizes: units of each hidden layer; ``()`` is a linear model.
    :param str activation: ``"tanh"``, ``"relu"``, ``"silu"``, ``"gelu"`` or ``"logistic"``.
    :param prior_scale: prior of the weights, as in :class:`~pyro_apd.BNN`; inputs are standardised.
    :param class_weight: None, ``"balanced"``, or a dict from class to the factor of its log-likelihood.
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
    :ivar classes_: labels, ``(K,)``.
    :ivar DistilledPosterior distilled_: the generator, after ``fit(distil=True)``; predictions come from it.
    :ivar posterior_: the same, or after ``fit(distil=False)`` the draws of the chain by site.
    :ivar BNN model_: the Pyro model, of standardised inputs, and :ivar MCMC mcmc_: the run; both serve the rest of the
        library. ``mcmc_`` is left out of pickles and files.

    Example::

        classifier = BNNClassifier(random_state=0).fit(X_train, y_train)
        classifier.predict_proba(X_test)
        classifier.predict_uncertainty(X_test)["mutual_information"]
    """

    def __init__(
        self,
        hidden_layer_sizes: Any = (32,),
        activation: str = "tanh",
        *,
        prior_scale: Any = "fan_in",
        class_weight: Any = None,
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
        self.class_weight = class_weight
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

    def fit(self, X: Any, y: Any, sample_weight: Any = None, *, distil: bool = True) -> Self:
        """Samples the posterior, and distils it.

        :param X: numbers ``(N, D)``: an array, or a frame of pandas or polars.
        :param y: labels ``(N,)``.
        :param sample_weight: factors of the log-likelihood of the rows, ``(N,)``, 0 or more.
        :param bool distil: whether to fit a generator to the draws, from which predictions are made.
        :raises ValueError: if data or parameters are not as described; missing values are named.
        """
        X, y = checked_inputs(self, X, y, reset=True)
        check_classification_targets(y)
        weights = checked_weights(sample_weight, len(X))
        self.classes_, index = np.unique(y, return_inverse=True)
        # Rows of weight 0 are as absent: a class of such rows alone is none.
        present = np.unique(index if weights is None else index[weights > 0])
        if len(present) < 2:
            only, where = self.classes_[present].tolist(), "" if weights is None else ", without rows of weight 0"
            raise ValueError(
                f"{type(self).__name__} needs at least two classes; the data have one class, {only[0]!r}{where}."
            )
        self._class_factors = (
            None if self.class_weight is None else compute_class_weight(self.class_weight, classes=self.classes_, y=y)
        )
        self._sample(X, torch.as_tensor(index), weights, distil)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes, averaged over networks, ``(N, K)``; columns as :attr:`classes_`.

        :raises ValueError: if ``X`` has other columns than in :meth:`fit`, or missing values.
        :raises NotFittedError: before :meth:`fit`.
        """
        return np.concatenate([block.probs_SNK.mean(0).numpy() for block in self._blocks(X)])  # type: ignore[union-attr]

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each row, ``(N,)``; errors as :meth:`predict_proba`."""
        probs_NK = self.predict_proba(X)
        labels: np.ndarray = self.classes_[probs_NK.argmax(axis=1)]
        return labels

    def predict_uncertainty(self, X: Any) -> dict[str, np.ndarray]:
        """How unsure the posterior is about each row, in nats: two scores ``(N,)`` by name.

        ``"entropy"`` is that of the averaged probabilities, from overlap of the classes and from not knowing.
        ``"mutual_information"`` is the part of it that is disagreement between networks, and is large far from the
        data. Errors as :meth:`predict_proba`.
        """
        scores: dict[str, list[np.ndarray]] = {"entropy": [], "mutual_information": []}
        for block in self._blocks(X):
            assert block.probs_SNK is not None
            scores["entropy"].append(predictive_entropy(block.probs_SNK).numpy())
            scores["mutual_information"].append(mutual_information(block.probs_SNK).numpy())
        return {name: np.concatenate(parts) for name, parts in scores.items()}

    def _likelihood(self) -> tuple[str, dict[str, Any]]:
        return "categorical", {"class_weight": self._class_factors}

    def _num_outputs(self) -> int:
        return len(self.classes_)
