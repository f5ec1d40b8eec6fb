# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""From a run's arguments to a source of mini-batches."""
