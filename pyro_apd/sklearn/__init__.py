# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Estimators of scikit-learn whose predictions are those of a Bayesian neural network's posterior.

They need the extra ``pip install 'pyro-apd[sklearn]'``; nothing else of the package imports scikit-learn for them.
"""

try:
    import sklearn as sklearn
except ImportError as error:
    raise ImportError(
        f"pyro_apd.sklearn needs scikit-learn, which cannot be imported ({error}): pip install 'pyro-apd[sklearn]'."
    ) from error

from pyro_apd.sklearn.classifier import BNNClassifier
from pyro_apd.sklearn.regressor import BNNRegressor

__all__ = ["BNNClassifier", "BNNRegressor"]
