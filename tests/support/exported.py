# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Small posteriors with random generators, for programs that are exported from them."""

import torch
from torch import nn

from pyro_apd.generators import SubspaceGenerator
from pyro_apd.generators.low_rank import LowRankGenerator
from pyro_apd.models.bnn import BNN
from pyro_apd.models.layout import Layout
from pyro_apd.posterior.posterior import DistilledPosterior


def mlp(outputs=3):
    """4-6-3."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs))


def layout_of(bnn):
    """Sites of a BNN, from one run of its priors."""
    draws = {site: prior.sample()[None] for site, prior in bnn.priors.items()}
    return Layout.from_draws(draws, {site: prior.support for site, prior in bnn.priors.items()})


def subspace_posterior(outputs=3, options=(), **settings):
    """A subspace generator with two chains of two modes, one matrix with a null part, and numbers of no matrix.

    :param options: of the matrix: whether it has an offset, and scales.
    """
    bnn = BNN(mlp(outputs), **settings)
    layout = layout_of(bnn)
    weight, bias = layout["net.0.weight"], layout["net.0.bias"]
    matrices = [(weight.start, 6, 4, bias.start, 0, 3, *options)]
    generator = SubspaceGenerator(layout.size, matrices, 2, 2, 3, 2).requires_grad_(False)
    values = torch.Generator().manual_seed(0)
    for tensor in generator.state_dict().values():
        random = torch.randn(tensor.shape, generator=values)
        tensor.copy_(0.2 * random.abs() + 0.1 if tensor.is_floating_point() else (3 * random).round().clamp(-9, 9))
    for part in generator.parts_in_order():
        if getattr(part, "has_scales", False):
            part.exponents.clamp_(-2, 1)
    return DistilledPosterior(layout, generator), bnn


def low_rank_posterior(net, **settings):
    """A Gaussian around the weights of a network."""
    bnn = BNN(net, **settings)
    layout = layout_of(bnn)
    weights = layout.join({site: bnn.init_to_network({"name": site, "fn": bnn.priors[site]}) for site in layout.names})
    values = torch.Generator().manual_seed(0)
    deviations = 0.1 * torch.randn(2, layout.size, generator=values)
    return DistilledPosterior(layout, LowRankGenerator.of(weights, deviations, 0.05 * torch.ones(layout.size))), bnn
