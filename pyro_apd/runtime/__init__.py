# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What every other room may use: trees of tensors, global state, processes, files, hashing. Knows no Pyro model."""
