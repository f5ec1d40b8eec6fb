# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What draws are compared by."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_apd as apd
from pyro_apd.distillation.function_space import FunctionSpace, function_space
from pyro_apd.distillation.source import Source
from pyro_apd.models.layout import Layout
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


def _two_outputs(x, y=None, *, is_outer):
    """A line per output; outputs are a plate around the data, or columns of them."""
    slope = pyro.sample("slope", dist.Normal(0, 1).expand([2]).to_event(1))
    # Weights have batch dimensions on the left where draws are vectorised.
    if is_outer:
        with pyro.plate("outputs", 2, dim=-2), pyro.plate("data", len(x), dim=-1):
            return pyro.sample("obs", dist.Normal(slope[..., :, None] * x, 1.0), obs=y)
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(slope[..., None, :] * x[:, None], 1.0).to_event(1), obs=y)


@pytest.mark.parametrize("is_outer", [False, True])
def test_outputs_of_an_input_are_next_to_each_other(is_outer):
    theta_CSD, x = torch.randn(1, 6, 2), torch.randn(7)
    source = Source(theta_CSD, Layout({"slope": (2,)}), partial(_two_outputs, is_outer=is_outer), (x,))
    functions, _ = function_space(source, (x,))
    (values_PSF,) = functions.views(theta_CSD[0], (x,))
    expected_NOS = x[:, None, None] * theta_CSD[0].mT
    torch.testing.assert_close(values_PSF[..., 0], expected_NOS.flatten(0, 1))


@pytest.mark.parametrize("is_outer", [False, True])
def test_models_with_several_outputs_per_input_are_calibrated(is_outer):
    torch.manual_seed(0)
    draws = {"slope": torch.tensor([1.0, 30.0]) * torch.randn(200, 2)}
    model, x = partial(_two_outputs, is_outer=is_outer), torch.randn(50)
    posterior = apd.distill(draws, model, data=(x,), num_steps=0, seed=0, progress=False)
    assert abs(posterior.metadata["calibration"]["residuals"]["rows"]) < 0.3
    spread = posterior.get_samples(500)["slope"].std(0)
    torch.testing.assert_close(spread, draws["slope"].std(0), rtol=0.25, atol=0)
