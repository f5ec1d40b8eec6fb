# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Small fitted estimators, which the tests of this folder share."""

import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest

from pyro_apd.distillation import distill
from pyro_apd.sklearn import BNNClassifier, BNNRegressor

# Short runs of a small network.
SHORT = {
    "hidden_layer_sizes": (8,),
    "sampler": "sghmc",
    "num_samples": 50,
    "warmup_steps": 25,
    "num_chains": 2,
    "thinning": 10,
    "num_networks": 20,
    "random_state": 0,
}


@pytest.fixture(scope="package")
def table():
    random = np.random.default_rng(0)
    return pd.DataFrame(random.normal(size=(80, 3)) * [1.0, 10.0, 0.1] + [0.0, 50.0, 2.0], columns=["a", "b", "c"])


@pytest.fixture(scope="package")
def target(table):
    noise = np.random.default_rng(1).normal(size=len(table))
    return 1000 + 30 * table["a"].to_numpy() + 2 * (table["b"].to_numpy() - 50) + 5 * noise


@pytest.fixture(scope="package")
def labels(table):
    return np.where(table["a"] > 0.5, "high", np.where(table["a"] < -0.5, "low", "middle"))


def fitted(estimator, *args, **kwargs):
    """A generator that is fitted in closed form only: of runs this short it would be trained further."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro_apd.sklearn.base.distill", partial(distill, num_steps=0))
        warnings.simplefilter("ignore")  # runs this short warn that they are
        return estimator.fit(*args, **kwargs)


@pytest.fixture(scope="package")
def regressor(table, target):
    return fitted(BNNRegressor(**SHORT), table, target)


@pytest.fixture(scope="package")
def by_input(table, target):
    return fitted(BNNRegressor(noise="by_input", **SHORT), table, np.stack([target, -target], 1), distil=False)


@pytest.fixture(scope="package")
def classifier(table, labels):
    return fitted(BNNClassifier(class_weight="balanced", **SHORT), table, labels)
