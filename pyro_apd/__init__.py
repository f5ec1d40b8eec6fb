# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""SG-MCMC for Pyro's ``MCMC`` driver, and adversarial distillation of what it draws.

A Bayesian neural network is sampled with :class:`SGLD` inside :class:`pyro.infer.MCMC`; :func:`distill` trains a
generator on the draws, a :class:`DistilledPosterior`, which stands in for them wherever Pyro takes a posterior.
"""

from pyro_apd import active_learning, adversarial, baselines, datasets, diagnostics, metrics, ood, uncertainty
from pyro_apd._version import __version__ as __version__
from pyro_apd.chains import MCMC, CheckpointError, WorkerError, open_store
from pyro_apd.distillation import DistillationError, DistillationWarning, OnlineDistillation, distill, distill_online
from pyro_apd.errors import ArtifactError, DataError, DivergenceError, ModelError
from pyro_apd.kernels import PSGLD, SGHMC, SGLD, WarmupWarning, schedules
from pyro_apd.models.bnn import BNN
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.predictive.predictive import FunctionView, Predictive, function_values, log_likelihood, outputs
from pyro_apd.predictive.reductions import reduce_outputs
from pyro_apd.runtime.hashing import fingerprint
from pyro_apd.runtime.ranks import RankError

__all__ = [
    "BNN",
    "MCMC",
    "PSGLD",
    "SGHMC",
    "SGLD",
    "ArtifactError",
    "CheckpointError",
    "DataError",
    "DistillationError",
    "DistillationWarning",
    "DistilledPosterior",
    "DivergenceError",
    "FunctionView",
    "ModelError",
    "OnlineDistillation",
    "Predictive",
    "RankError",
    "WarmupWarning",
    "WorkerError",
    "active_learning",
    "adversarial",
    "baselines",
    "datasets",
    "diagnostics",
    "distill",
    "distill_online",
    "fingerprint",
    "function_values",
    "log_likelihood",
    "metrics",
    "ood",
    "open_store",
    "outputs",
    "reduce_outputs",
    "schedules",
    "uncertainty",
]
