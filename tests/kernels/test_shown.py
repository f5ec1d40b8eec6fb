# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_value

import pyro_apd as apd


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, 1), obs=y)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (partial(apd.SGLD, step_size=1e-4), "SGLD(step_size=0.0001)"),
        (partial(apd.SGLD, step_size="auto", seed=0, warm_start=0), "SGLD(step_size='auto', seed=0)"),
        (partial(apd.SGHMC, step_size=0.1, friction=0.2, thinning=5), "SGHMC(step_size=0.1, friction=0.2, thinning=5)"),
        (partial(apd.PSGLD, step_size=0.1, batch_size=9), "PSGLD(step_size=0.1, batch_size=9)"),
        (partial(apd.MCLMC), "MCLMC(step_size='auto')"),
        (
            partial(apd.SGLD, step_size=lambda step: 0.1, init_strategy=partial(init_to_value, values={})),
            "SGLD(step_size=<lambda>, init_strategy=init_to_value)",
        ),
        (
            partial(apd.SGLD, step_size=apd.schedules.PolynomialDecay(0.1, 1.0, 0.6)),
            "SGLD(step_size=PolynomialDecay(a=0.1, b=1.0, gamma=0.6))",
        ),
    ],
)
def test_a_kernel_shows_the_settings_that_are_not_defaults(kernel, expected):
    assert repr(kernel(model)) == expected


_ONES = torch.ones(2)


class Scaled(apd.SGLD):
    """A kernel of a user, whose setting is a tensor."""

    def __init__(self, model, step_size, scale=_ONES, **settings):
        self.scale = scale
        super().__init__(model, step_size, **settings)


def test_settings_may_be_tensors():
    assert repr(Scaled(model, 0.1)) == "Scaled(step_size=0.1)"
    assert repr(Scaled(model, 0.1, torch.zeros(2))) == "Scaled(step_size=0.1, scale=tensor([0., 0.]))"
    assert "\n" not in repr(Scaled(model, 0.1, torch.zeros(50, 50)))


def test_it_shows_why_it_was_recommended_and_what_was_chosen():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    kernel = apd.recommended_kernel(model, x, x.sum(1), seed=0, thinning=1)
    assert repr(kernel).splitlines()[1] == f"  reason     {kernel.reason}"
    kernel.tuning = {"step_size": 0.0123}
    assert "  step size  0.0123, chosen during warm-up" in repr(kernel)
