# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Utilities for all other packages: checks, seeds, global state, processes, files, hashing. Independent of models."""
