# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Chain and generator side by side: metrics, standard errors, verdict."""
