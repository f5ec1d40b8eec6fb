# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

from tests.support.small_posteriors import case

__all__ = ["case"]
