# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The version, for whatever needs it without importing the rest."""

__version__ = "0.1.0"
