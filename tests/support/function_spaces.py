# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Function spaces of small classifiers."""

import torch
from torch import nn

import pyro_apd as apd
from pyro_apd.distillation.function_space import FunctionSpace, function_space
from pyro_apd.distillation.source import Source
from pyro_apd.generators.draw_blocks import DrawBlocks
from pyro_apd.models.layout import Layout

LAYOUT = Layout({"w": (3,)})


def logits_of(draws, x):
    """Log-probabilities of a model with one parameter per class, whose logits are x w."""
    return (x[:, None] * draws["w"][:, None, :]).log_softmax(-1)


def space(kind="categorical"):
    """Its function space."""
    return FunctionSpace(logits_of, LAYOUT, kind, model=None)


def linear_classifier():
    """Draws of a linear classifier, its inputs, and how its draws are compared: ``(DrawBlocks, x, functions)``."""
    torch.manual_seed(0)
    model = apd.BNN(nn.Linear(8, 5), likelihood="categorical")
    layout = Layout({"net.weight": (5, 8), "net.bias": (5,)})
    theta_CSD = 0.4 * torch.randn(1, 80, layout.size)
    x = torch.randn(60, 8)
    return DrawBlocks(theta_CSD), x, function_space(Source(theta_CSD, layout, model, (x,)), None)
