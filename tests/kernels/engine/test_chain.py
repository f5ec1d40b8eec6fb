# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Chains that advance together are the chains that they would be alone, and any of them can be stopped and resumed."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pyro_apd.errors import DivergenceError
from pyro_apd.kernels import MCLMC, PSGLD, SGHMC, SGLD
from pyro_apd.kernels.engine.chain_set import ChainSet
from tests.support.models import Classifier, Conjugate, constrained

PROBLEM = Conjugate()
X, LABELS = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3


def loader():
    return DataLoader(TensorDataset(PROBLEM.x, PROBLEM.y), batch_size=50, shuffle=True)


def network(kernel_class, **settings):
    return kernel_class(Classifier(), 1e-3, batch_size=20, seed=1, **settings), (X, LABELS)


CASES = {
    "SGLD": lambda: network(SGLD),
    "SGHMC": lambda: network(SGHMC),
    "PSGLD": lambda: network(PSGLD),
    "MCLMC": lambda: network(MCLMC),
    "control variates": lambda: network(SGLD, control_variates=True),
    "full batch": lambda: (SGLD(PROBLEM.full, 1e-3, seed=1), (PROBLEM.x, PROBLEM.y)),
    "plate": lambda: (SGLD(PROBLEM.subsampling, 1e-3, seed=1), (PROBLEM.x, PROBLEM.y)),
    "loader": lambda: (SGLD(PROBLEM.full, 1e-3, seed=1), (loader(),)),
    "loader, as it is due": lambda: (SGLD(PROBLEM.full, 1e-3, seed=1, prefetch=0), (loader(),)),
    "file": lambda: (SGLD(PROBLEM.full, 1e-3, seed=1, batch_size=50), (PROBLEM.x.numpy(), PROBLEM.y)),
    "with replacement": lambda: network(SGLD, replacement=True),
    "constrained": lambda: (SGLD(constrained, 1e-3, seed=1), (torch.linspace(-1, 1, 20),)),
    "traced": lambda: (SGLD(PROBLEM.full, 1e-3, seed=1, capture=False), (PROBLEM.x, PROBLEM.y)),
}


# Capturing takes most of the time here.
TRACED = {"constrained": lambda: (SGLD(constrained, 1e-3, seed=1, capture=False), (torch.linspace(-1, 1, 20),))}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


@pytest.fixture(params=CASES)
def resumed_case(request):
    return {**CASES, **TRACED}[request.param]()


def advance(chain, num_steps):
    with torch.no_grad():
        chain.advance(num_steps)
    return chain.theta


@pytest.mark.slow
def test_chains_together_are_the_chains_alone(case):
    kernel, args = case
    together = kernel.begin(args, {}, warmup_steps=0, chains=ChainSet(2, 3))
    alone = [advance(kernel.begin(args, {}, warmup_steps=0, chains=ChainSet(i)), 12) for i in (2, 3, 4)]
    torch.testing.assert_close(advance(together, 12), torch.stack(alone), rtol=1e-4, atol=1e-5)
    assert together.energy.shape == together.gradient_norm.shape == (3,)
    assert together.statistics()["step_size"].tolist() == pytest.approx([1e-3] * 3)
    assert not torch.equal(alone[0], alone[1])


@pytest.mark.slow
@pytest.mark.parametrize("num_chains", [None, 2])
def test_resumed_chains_go_on_bit_for_bit(resumed_case, num_chains):
    """Stopped before the first step, after it, and later."""
    kernel, args = resumed_case
    chain, states, thetas = kernel.begin(args, {}, warmup_steps=0, chains=ChainSet(count=num_chains)), {}, {}
    states[0] = chain.state_dict()
    for num_steps in (1, 7, 1, 8):
        theta = advance(chain, num_steps).clone()
        thetas[chain.step] = theta
        states[chain.step] = chain.state_dict()
    for taken in (0, 1, 9):
        resumed = kernel.begin(args, {}, warmup_steps=0, chains=ChainSet(count=num_chains))
        resumed.load_state_dict(states[taken])
        assert resumed.step == taken
        assert torch.equal(advance(resumed, 8), thetas[taken + 8])


def quartic(y):
    """Stable near the origin only."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    pyro.factor("well", -(w**4).sum())
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(w.sum(), 1.0), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("kernel_class", [SGLD, SGHMC])
def test_a_chain_that_diverges_is_frozen_and_the_others_go_on(kernel_class):
    kernel = kernel_class(quartic, 1e-2, seed=0, temperature=1e-3)
    starts = {"w": torch.tensor([[0.1, 0.1], [300.0, 300.0], [-0.1, 0.2]])}
    chain = kernel.begin((torch.zeros(3),), {}, warmup_steps=0, chains=ChainSet(count=3), initial_params=starts)
    advance(chain, 200)
    assert [error.chain for error in chain.divergences] == [1]
    assert chain.divergences[0].site == "w"
    assert "in chain 1" in str(chain.divergences[0])
    frozen = chain.theta
    assert bool(frozen.isfinite().all())
    torch.testing.assert_close(frozen[1], starts["w"][1])  # the last state that was good
    later = advance(chain, 60)
    assert torch.equal(later[1], frozen[1])
    assert not torch.equal(later[0], frozen[0])
    assert len(chain.divergences) == 1
    kernel.logging()
    resumed = kernel.begin((torch.zeros(3),), {}, warmup_steps=0, chains=ChainSet(count=3), initial_params=starts)
    resumed.load_state_dict(chain.state_dict())
    assert [str(error) for error in resumed.divergences] == [str(error) for error in chain.divergences]
    assert torch.equal(advance(resumed, 60), advance(chain, 60))


def test_when_all_diverge_it_raises():
    kernel = SGLD(PROBLEM.full, 10.0, seed=0)
    chain = kernel.begin((PROBLEM.x, PROBLEM.y), {}, warmup_steps=0, chains=ChainSet(count=2))
    with pytest.raises(DivergenceError, match="in chain"):
        advance(chain, 200)
    assert sorted(error.chain for error in chain.divergences) == [0, 1]


@pytest.mark.slow
def test_schedules_reach_every_step_of_a_chain():
    kernel = SGLD(PROBLEM.full, lambda step: 1e-3 / (step + 1), seed=1, temperature=0.0)
    chain = kernel.begin((PROBLEM.x, PROBLEM.y), {}, warmup_steps=0, initial_params={"w": torch.zeros(3)})
    theta = torch.zeros(3)
    for step in range(3):
        gradient = theta + PROBLEM.x.T @ (PROBLEM.x @ theta - PROBLEM.y)
        theta = theta - 0.5e-3 / (step + 1) * gradient
    torch.testing.assert_close(advance(chain, 3), theta)
