# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from torch import nn

import pyro_apd as apd
from pyro_apd.distillation.chosen_inputs import ChosenInputs, values_at
from pyro_apd.distillation.function_space import function_space
from pyro_apd.distillation.source import Source
from pyro_apd.generators.draw_blocks import DrawBlocks
from pyro_apd.models.layout import Layout


@pytest.fixture
def case():
    """How draws of a linear classifier are compared, its inputs, and the draws."""
    torch.manual_seed(0)
    model = apd.BNN(nn.Linear(8, 5), likelihood="categorical")
    layout = Layout({"net.weight": (5, 8), "net.bias": (5,)})
    theta_CSD = 0.4 * torch.randn(1, 80, layout.size)
    space, probes = function_space(Source(theta_CSD, layout, model, (torch.randn(60, 8),)), None)
    return space, probes, DrawBlocks(theta_CSD)


def test_weighted_inputs_stand_for_all_candidates(case):
    space, probes, draws = case
    found, wanted = [], []
    for seed in range(20):
        torch.manual_seed(seed)
        inputs = ChosenInputs.chosen(space, probes, draws, 80, 800)
        assert inputs.lengths == {"rows": 40, "near": 20, "far": 20}
        assert len(inputs.weight_P) == len(inputs.rows[0]) == 80
        found.append(inputs.disagreements(space, draws.rows())["rows"])
        every = space.views(torch.cat(list(draws.rows())), probes.groups(800)["rows"])
        wanted.append(space.disagreements(every).mean(0))
        torch.testing.assert_close(found[-1], wanted[-1], rtol=0.1, atol=0)
    # Without bias: closer than any one of them must be.
    torch.testing.assert_close(torch.stack(found).mean(0), torch.stack(wanted).mean(0), rtol=0.02, atol=0)


def test_values_do_not_depend_on_blocks_of_draws_and_inputs(case):
    space, probes, draws = case
    rows = probes.groups(600)["rows"]
    whole = space.views(torch.cat(list(draws.rows())), rows)
    parts = values_at(space, torch.cat(list(draws.rows())).split(7), rows)
    for found, wanted in zip(parts, whole, strict=True):
        torch.testing.assert_close(found, wanted)
