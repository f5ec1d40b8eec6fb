# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_apd.kernels import SGHMC
from pyro_apd.kernels.engine import step as step_module
from pyro_apd.kernels.engine.chain_set import ChainSet
from pyro_apd.kernels.engine.cuda_graphs import replayed
from tests.support.models import Conjugate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def program(state, other, given):
    state.add_(given)
    other.mul_(2)
    return (state.sum(), other + given)


def test_a_graph_does_as_its_program_and_leaves_the_state_alone():
    state, other = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    fast = replayed(program, [state, other], [torch.ones(3, device="cuda")])
    assert state.tolist() == [0.0] * 3
    assert other.tolist() == [1.0] * 3
    first = fast(state, other, torch.full((3,), 5.0, device="cuda"))
    fast(state, other, torch.full((3,), 7.0, device="cuda"))
    assert state.tolist() == [12.0] * 3
    assert other.tolist() == [4.0] * 3
    assert float(first[0]) == 15.0  # not overwritten by the second call


def test_graphs_are_an_option(monkeypatch):
    problem = Conjugate()
    x, y = problem.x.cuda(), problem.y.cuda()
    monkeypatch.setattr(step_module, "replayed", lambda *args: pytest.fail("replayed"))
    chain = SGHMC(problem.full, 1e-4, batch_size=50, seed=1, compile=True).begin((x, y), {}, warmup_steps=0)
    with torch.no_grad():
        chain.advance(5)
    assert chain.path == "compiled"


@pytest.mark.parametrize("num_chains", [None, 4])
def test_chains_on_a_gpu(num_chains):
    problem = Conjugate()
    problem.x, problem.y = x, y = problem.x.cuda(), problem.y.cuda()
    chains = [
        SGHMC(problem.full, 1e-4, batch_size=50, thinning=5, seed=1, compile=compile, cuda_graphs=True).begin(
            (x, y), {}, warmup_steps=0, chains=ChainSet(count=num_chains)
        )
        for compile in (False, True)
    ]
    with torch.no_grad():
        for chain in chains:
            chain.advance(50)
    assert chains[1].path == "compiled"
    torch.testing.assert_close(chains[1].theta, chains[0].theta, rtol=1e-3, atol=1e-4)
