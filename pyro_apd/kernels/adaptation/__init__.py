# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What is found during warm-up: the step size, from measured curvature, noise and drift; warm starts."""
