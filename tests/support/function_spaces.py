# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The function space of a small classifier."""

from pyro_apd.distillation.function_space import FunctionSpace
from pyro_apd.models.layout import Layout

LAYOUT = Layout({"w": (3,)})


def logits_of(draws, x):
    """Log-probabilities of a model with one parameter per class, whose logits are x w."""
    return (x[:, None] * draws["w"][:, None, :]).log_softmax(-1)


def space(kind="categorical"):
    """Its function space."""
    return FunctionSpace(logits_of, LAYOUT, kind, model=None)
