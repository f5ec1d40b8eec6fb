# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Active learning: a Bayesian model says which data to have labelled next.

:func:`run` is the loop; a posterior is any callable of the form in :mod:`~pyro_apd.active_learning.posteriors`.

Example::

    chain = active_learning.Chain(step_size=5e-4, num_samples=50, warmup_steps=50, thinning=20)
    history = active_learning.run(
        model, x_pool, y_pool, x_test, y_test, posterior=active_learning.Distilled(chain), acquisition="bald"
    )
"""

from pyro_apd.active_learning.acquisition import ACQUISITIONS, SCORES, batch_bald, mean_sd, select
from pyro_apd.active_learning.history import History, Round
from pyro_apd.active_learning.loop import balanced, run
from pyro_apd.active_learning.posteriors import Baseline, Chain, Distilled

__all__ = [
    "ACQUISITIONS",
    "SCORES",
    "Baseline",
    "Chain",
    "Distilled",
    "History",
    "Round",
    "balanced",
    "batch_bald",
    "mean_sd",
    "run",
    "select",
]
