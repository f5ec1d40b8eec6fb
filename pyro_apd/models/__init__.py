# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Bayesian neural networks, and Pyro models as potentials: layout of the latents, scaling, gradients."""
