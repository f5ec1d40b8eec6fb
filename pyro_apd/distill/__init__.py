# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Training a generator on the draws of a chain."""

from pyro_apd.distill.failure import DistillationError, DistillationWarning
from pyro_apd.distill.offline import distill

__all__ = ["DistillationError", "DistillationWarning", "distill"]
