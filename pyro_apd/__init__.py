# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""SG-MCMC for Pyro's ``MCMC`` driver, and adversarial distillation of what it draws.

A Bayesian neural network is sampled with :class:`SGLD` inside :class:`pyro.infer.MCMC`; :func:`distill` trains a
generator on the draws, a :class:`DistilledPosterior`, which stands in for them wherever Pyro takes a posterior.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyro_apd._version import __version__ as __version__

if TYPE_CHECKING:
    from pyro_apd import (
        active_learning,
        adversarial,
        baselines,
        datasets,
        diagnostics,
        export,
        metrics,
        ood,
        uncertainty,
    )
    from pyro_apd.chains import MCMC, CheckpointError, WorkerError, open_store
    from pyro_apd.distillation import (
        DistillationError,
        DistillationWarning,
        OnlineDistillation,
        distill,
        distill_online,
    )
    from pyro_apd.errors import ArtifactError, DataError, DivergenceError, ExportError, ModelError
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

# All is imported when it is first used: loading a posterior needs no samplers, and a server starts sooner.
_ROOMS = {
    "active_learning",
    "adversarial",
    "baselines",
    "datasets",
    "diagnostics",
    "export",
    "metrics",
    "ood",
    "uncertainty",
    # Not listed in __all__: what `import pyro_apd` made known before it imported so little.
    *(
        "chains",
        "data",
        "distillation",
        "errors",
        "generators",
        "kernels",
        "models",
        "posterior",
        "predictive",
        "runtime",
    ),
}
_NAMES_OF = {
    "chains": (
        "CheckpointError",
        "MCMC",
        "WorkerError",
        "open_store",
    ),
    "distillation": (
        "DistillationError",
        "DistillationWarning",
        "OnlineDistillation",
        "distill",
        "distill_online",
    ),
    "errors": (
        "ArtifactError",
        "DataError",
        "DivergenceError",
        "ExportError",
        "ModelError",
    ),
    "kernels": (
        "ExcursionWarning",
        "InflationWarning",
        "MCLMC",
        "MixingWarning",
        "PSGLD",
        "SGHMC",
        "SGLD",
        "TemperatureWarning",
        "WarmupWarning",
        "recommended_kernel",
        "schedules",
    ),
    "models.bnn": ("BNN",),
    "posterior.posterior": ("DistilledPosterior",),
    "predictive.predictive": (
        "FunctionView",
        "Predictive",
        "function_values",
        "log_likelihood",
        "outputs",
    ),
    "predictive.reductions": ("reduce_outputs",),
    "runtime.hashing": ("fingerprint",),
    "runtime.ranks": ("RankError",),
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}

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
    "ExportError",
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
    "export",
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


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"pyro_apd.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'pyro_apd' has no attribute {name!r}")
    found = getattr(import_module(f"pyro_apd.{_MODULE_OF[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
