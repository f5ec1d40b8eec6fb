# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Predictions under many draws at once, and the one reader of draws."""
