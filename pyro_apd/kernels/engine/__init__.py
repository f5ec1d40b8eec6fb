# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What advances a chain: steps, noise, compiled programs, divergence."""
