# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Training a generator on the draws of a chain: afterwards, or as they are made."""

from pyro_apd.distillation.failure import DistillationError, DistillationWarning
from pyro_apd.distillation.offline import distill
from pyro_apd.distillation.online import distill_online
from pyro_apd.distillation.streaming import OnlineDistillation

__all__ = ["DistillationError", "DistillationWarning", "OnlineDistillation", "distill", "distill_online"]
