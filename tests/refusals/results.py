# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Entries of one group, see :mod:`tests.refusals`."""

from tests.refusals.refusal import Refusal

REFUSALS: list[Refusal] = []
