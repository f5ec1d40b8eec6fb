# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The warm-up of adjusted trajectories: its aim, what it reports, and its warning."""

import pytest
import torch

from pyro_apd.chains.driver import MCMC
from pyro_apd.errors import ModelError
from pyro_apd.kernels import MCLMC, MixingWarning
from pyro_apd.kernels.adaptation.adjusted import ACCEPTANCE, TRAJECTORY_VARIANCE
from pyro_apd.kernels.engine.chain_set import ChainSet
from tests.support.exactness import assert_gaussian, assert_resumes
from tests.support.models import MEAN, SDS, Conjugate, badly_scaled

PROBLEM = Conjugate()
DATA = (PROBLEM.x, PROBLEM.y)


def test_the_variance_gives_the_acceptance():
    errors = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * TRAJECTORY_VARIANCE**0.5
    probability = torch.exp(-(errors + TRAJECTORY_VARIANCE / 2).clamp_min(0))
    assert float(probability.mean()) == pytest.approx(ACCEPTANCE, abs=0.003)


@pytest.mark.slow
def test_automatic_warm_up_on_an_ill_conditioned_gaussian():
    kernel = MCLMC(badly_scaled, adjusted=True, seed=0)
    mcmc = MCMC(kernel, 80, 300, num_chains=96, disable_progbar=True)
    mcmc.run()
    assert_gaussian(mcmc.get_samples(group_by_chain=True)["w"].double(), MEAN, torch.diag(SDS.square()))
    assert kernel.tuning["acceptance"] == pytest.approx(ACCEPTANCE, abs=0.07)
    assert kernel.tuning["step_size"] > 0.5
    assert 0 < mcmc.diagnostics()["tuning"]["chain 0"]["acceptance"] < 1


def test_a_low_acceptance_warns():
    mcmc = MCMC(MCLMC(PROBLEM.full, 0.5, adjusted=True, seed=0), 30, 10, num_chains=2, disable_progbar=True)
    with pytest.warns(MixingWarning, match=r"of a chain were accepted with a mean probability of \S+ .*step_size=0.5"):
        mcmc.run(*DATA)


def test_mini_batches_are_refused():
    with pytest.raises(ModelError, match="adjusted=True accepts trajectories by the potential of all the data"):
        MCMC(MCLMC(PROBLEM.full, adjusted=True, batch_size=10), 2, 2, disable_progbar=True).run(*DATA)


@pytest.mark.slow
@pytest.mark.parametrize("taken", [0, 30, 100, 130])
def test_resumed_bit_for_bit(taken):
    kernel = MCLMC(PROBLEM.full, seed=1, adjusted=True)
    begin = {"warmup_steps": 120, "num_samples": 50, "chains": ChainSet(count=2)}
    assert_resumes(kernel, begin, DATA, taken, 150)


@pytest.mark.thorough
def test_compiled_trajectories_are_the_eager_ones():
    def thetas(compile):
        kernel = MCLMC(PROBLEM.full, 0.05, adjusted=True, leaps=3, seed=1, compile=compile)
        chain = kernel.begin(DATA, {}, warmup_steps=0, chains=ChainSet(count=3))
        with torch.no_grad():
            chain.advance(15)
        return chain.theta, chain.path

    (eager, _), (compiled, path) = thetas(False), thetas(True)
    assert path == "compiled"
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)
