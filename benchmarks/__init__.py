# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Each module prints a table and writes JSON beside it: ``python -m benchmarks.NAME``."""
