# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""SG-MCMC for Pyro's ``MCMC`` driver, and adversarial distillation of what it draws.

A Bayesian neural network is sampled with :class:`SGLD` inside :class:`pyro.infer.MCMC`; :func:`distill` trains a
generator on the draws, a :class:`DistilledPosterior`, which stands in for them wherever Pyro takes a posterior.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from pyro_apd import metrics, uncertainty
from pyro_apd._version import __version__ as __version__
from pyro_apd.chains import MCMC, CheckpointError, WorkerError, open_store
from pyro_apd.distillation import DistillationError, DistillationWarning, OnlineDistillation, distill, distill_online
from pyro_apd.errors import ArtifactError, DataError, DivergenceError, ModelError
from pyro_apd.kernels import (
    MCLMC,
    PSGLD,
    SGHMC,
    SGLD,
    ExcursionWarning,
    InflationWarning,
    MixingWarning,
    TemperatureWarning,
    WarmupWarning,
    recommended_kernel,
    schedules,
)
from pyro_apd.models.bnn import BNN
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.predictive.predictive import FunctionView, Predictive, function_values, log_likelihood, outputs
from pyro_apd.predictive.reductions import reduce_outputs
from pyro_apd.runtime.hashing import fingerprint
from pyro_apd.runtime.ranks import RankError

if TYPE_CHECKING:
    from pyro_apd import active_learning, adversarial, baselines, datasets, diagnostics, ood

# Imported when they are first used: sampling and loading a posterior do without them.
_LAZY = {"active_learning", "adversarial", "baselines", "datasets", "diagnostics", "ood"}

__all__ = [
    "BNN",
    "MCLMC",
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
    "ExcursionWarning",
    "FunctionView",
    "InflationWarning",
    "MixingWarning",
    "ModelError",
    "OnlineDistillation",
    "Predictive",
    "RankError",
    "TemperatureWarning",
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
    "recommended_kernel",
    "reduce_outputs",
    "schedules",
    "uncertainty",
]


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return import_module(f"pyro_apd.{name}")
    raise AttributeError(f"module 'pyro_apd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
