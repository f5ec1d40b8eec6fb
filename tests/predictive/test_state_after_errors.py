# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A model that fails leaves no handler on Pyro's stack, and modules in the mode that they were in."""

import contextlib

import pyro
import pytest
import torch
from pyro.poutine import runtime
from torch import nn

from pyro_apd import BNN, MCMC, SGLD, Predictive, log_likelihood, outputs
from pyro_apd.diagnostics import compare
from pyro_apd.distillation.source import read_source

X, Y = torch.zeros(6, 3), torch.arange(6) % 2
DRAWS = {"net.0.weight": torch.zeros(9, 2, 3), "net.0.bias": torch.zeros(9, 2)}


class Failing(nn.Module):
    """Fails at a call."""

    def __init__(self, at, error):
        super().__init__()
        self.left, self.error = at, error

    def forward(self, x):
        self.left -= 1
        if self.left <= 0:
            raise self.error("failed")
        return x


CALLS = {
    "Predictive": lambda model: Predictive(model, DRAWS)(X),
    "parallel": lambda model: Predictive(model, DRAWS, parallel=True)(X),
    "reduced": lambda model: Predictive(model, DRAWS, reduce=("mean_probability",))(X),
    "outputs": lambda model: outputs(model, DRAWS, X),
    "log_likelihood": lambda model: log_likelihood(model, DRAWS, X, Y),
    "compare": lambda model: compare(DRAWS, DRAWS, model, X, Y, num_samples=8),
    "read_source": lambda model: read_source({**DRAWS, "other": torch.zeros(9)}, model, (X, Y)),
    "MCMC": lambda model: MCMC(SGLD(model, 1e-3, batch_size=2, seed=0), 2, 2, disable_progbar=True).run(X, Y),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize(("at", "error"), [(1, RuntimeError), (2, ZeroDivisionError), (3, KeyboardInterrupt)])
def test_a_failing_model_leaves_everything_as_it_was(call, is_training, at, error):
    net = nn.Sequential(nn.Linear(3, 2), Failing(at, error)).train(is_training)
    model = BNN(net)
    net.train(is_training)

    def state():
        modes = [module.training for module in (*net.modules(), *model.modules())]
        validates = pyro.distributions.is_validation_enabled()
        return modes, validates, torch.is_grad_enabled(), sorted(pyro.get_param_store().keys())

    before = state()
    with contextlib.suppress(RuntimeError, ZeroDivisionError, KeyboardInterrupt, ValueError):
        CALLS[call](model)
    assert runtime._PYRO_STACK == []
    assert state() == before
