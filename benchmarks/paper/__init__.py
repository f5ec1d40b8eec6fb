# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The experiments of Wang et al. (ICML 2018), each run by one command; see :mod:`benchmarks.paper.__main__`."""
