# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_apd.distillation.chosen_inputs import ChosenInputs, values_at
from tests.support.function_spaces import linear_classifier


@pytest.fixture
def case():
    """How draws of a linear classifier are compared, its inputs, and the draws."""
    draws, _, (space, probes) = linear_classifier()
    return space, probes, draws


def test_weighted_inputs_stand_for_all_candidates(case):
    space, probes, draws = case
    found, wanted = [], []
    for seed in range(20):
        torch.manual_seed(seed)
        inputs = ChosenInputs.chosen(space, probes, draws, 80, 800)
        assert inputs.lengths == {"rows": 40, "near": 20, "far": 20}
        assert len(inputs.weight_N) == len(inputs.rows[0]) == 80
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
