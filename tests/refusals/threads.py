# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Entries of one group, see :mod:`tests.refusals`."""

import pyro_apd as apd
from tests.refusals.refusal import Refusal

REFUSALS = [
    Refusal(
        title="A model in Pyro's handlers while another thread runs one",
        why="Pyro's handlers belong to the process: each of two threads would record, and condition, the sites of the "
        "other's model. `apd.Predictive` and `MCMC.run` of this package wait for their turn; Pyro's own do not.",
        example="""
        from concurrent.futures import ThreadPoolExecutor

        beside = pyro.infer.Predictive(apd.BNN(nn.Linear(3, 3)), num_samples=1)
        def model(x):
            with ThreadPoolExecutor(1) as pool:
                pool.submit(beside, x).result()
        apd.Predictive(model, num_samples=1)(x)
        """,
        error=apd.ModelError,
        mentions=("while thread 'MainThread' does", "pyro_apd.Predictive", "ensemble", "threading.Lock"),
        instead="""
        from concurrent.futures import ThreadPoolExecutor

        predict = apd.Predictive(apd.BNN(nn.Linear(3, 3)), num_samples=2)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(predict, [x, x + 1.0]))
        """,
    ),
]
