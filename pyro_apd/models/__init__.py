# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Bayesian neural networks, and what is established about a Pyro model: layout of its latents, scaling, potential."""
