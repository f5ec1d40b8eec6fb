# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What draws are compared by."""

import torch

from pyro_apd.distillation.function_space import FunctionSpace
from tests.support.function_spaces import LAYOUT, space


def test_views_are_log_probabilities_and_probabilities():
    theta_SD, x = torch.randn(4, 3), torch.tensor([0.5, 2.0])
    log_probs, probs = space().views(theta_SD, (x,))
    assert log_probs.shape == (2, 4, 3)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 4))
    assert len(space("normal").views(theta_SD, (x,))) == 1


def test_bernoulli_views_are_two_probabilities():
    view = FunctionSpace(lambda draws, x: draws["w"][:, None, :1] * x[:, None], LAYOUT, "bernoulli", model=None)
    _, probs = view.views(torch.randn(4, 3), (torch.tensor([1.0, 2.0]),))
    assert probs.shape == (2, 4, 2)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 4))


def test_distance_does_not_depend_on_the_unit_of_the_function():
    views = [torch.randn(5, 40, 2)], [1.7 * torch.randn(5, 40, 2)]
    scaled = [100 * views[0][0]], [100 * views[1][0]]
    torch.testing.assert_close(space().distance(*views), space().distance(*scaled), rtol=1e-3, atol=1e-4)
