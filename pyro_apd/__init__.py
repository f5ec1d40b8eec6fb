# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""SG-MCMC for Pyro's ``MCMC`` driver, and adversarial distillation of what it draws."""

__version__ = "0.1.0"
