# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Running chains: the driver, where draws are kept, checkpoints, and processes."""

from pyro_apd.chains.checkpoint import CheckpointError
from pyro_apd.chains.driver import MCMC, open_store
from pyro_apd.chains.workers import WorkerError

__all__ = ["MCMC", "CheckpointError", "WorkerError", "open_store"]
