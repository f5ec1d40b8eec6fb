# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The distilled posterior and its file. Nothing here needs the code that samples or trains."""

from pyro_apd.posterior.posterior import DistilledPosterior

__all__ = ["DistilledPosterior"]
