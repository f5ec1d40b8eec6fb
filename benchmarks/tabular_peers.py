# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""BDE at the settings of its README, in a Python that has ``sklearn-contrib-bde``.

``python tabular_peers.py IN.npz OUT.npz``. ``IN`` holds ``x``, ``y``, ``x_test``, ``num_classes`` (0 for a regression),
``hidden`` (units per layer), ``num_chains``, ``seed``, and ``share`` of the README's steps. ``OUT`` gets the outputs
``(C, S, N, K)`` of the networks on ``x_test``, and ``cpu_seconds`` of fitting, compiling included and imports not.
Nothing of this package is imported.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import numpy as np

#: Of the regression and of the classification in the README of ``sklearn-contrib-bde`` 1.0.2.
REGRESSION = {"epochs": 200, "lr": 1e-3, "weight_decay": 1e-4, "warmup_steps": 5000, "n_samples": 2000, "n_thinning": 2}
CLASSIFICATION = {"epochs": 1000, "lr": 1e-3, "warmup_steps": 400, "n_samples": 100, "n_thinning": 1}
BOTH = {"validation_split": 0.15, "patience": 10}
STEPS = ("epochs", "warmup_steps", "n_samples")


def fitted(job: dict[str, Any]) -> Any:
    """The estimator, with README's settings but for network, number of chains and seed."""
    from bde import BdeClassifier, BdeRegressor
    from bde.loss import CategoricalCrossEntropy, GaussianNLL

    is_classifier = int(job["num_classes"]) > 0
    settings = BOTH | (CLASSIFICATION if is_classifier else REGRESSION)
    settings |= {name: max(10, round(float(job["share"]) * settings[name])) for name in STEPS}
    settings |= {"hidden_layers": job["hidden"].tolist(), "activation": "relu", "seed": int(job["seed"])}
    settings |= {"n_members": int(job["num_chains"])}
    if is_classifier:
        return BdeClassifier(loss=CategoricalCrossEntropy(), **settings).fit(x=job["x"], y=job["y"].astype("int32"))
    return BdeRegressor(loss=GaussianNLL(), **settings).fit(x=job["x"], y=job["y"].reshape(-1, 1))


def main() -> None:
    """Runs the job."""
    source, target = sys.argv[1:]
    with np.load(source) as file:
        job = dict(file)
    # As README says; it must be set before JAX is imported.
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={job['num_chains']}"
    import jax  # noqa: F401  its import is not what is measured

    begun = time.process_time()
    estimator = fitted(job)
    used = time.process_time() - begun
    np.savez(target, cpu_seconds=used, outputs=np.asarray(estimator.predict(job["x_test"], raw=True)))


if __name__ == "__main__":
    main()
