# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Chains over processes: the same as in one, whatever becomes of some of them."""

import os

import pytest
import torch

from pyro_apd.chains.checkpoint import CheckpointError
from pyro_apd.chains.distributed import path_of_rank
from pyro_apd.chains.driver import MCMC, open_store
from pyro_apd.errors import DivergenceError
from pyro_apd.kernels import PSGLD, SGHMC, SGLD
from pyro_apd.ranks import RankError
from tests.chains.walk import Walk
from tests.models import Classifier, Conjugate, constrained
from tests.processes import on_ranks

pytestmark = pytest.mark.thorough

DATA = (torch.ones(4, 2),)
MODEL = Conjugate()


def driver(kernel=None, num_chains=3, method="distributed", **settings):
    settings = {"num_samples": 8, "warmup_steps": 3, "disable_progbar": True, **settings}
    return MCMC(Walk() if kernel is None else kernel, num_chains=num_chains, chain_method=method, **settings)


def run(kernel=None, data=DATA, **settings):
    mcmc = driver(kernel, **settings)
    mcmc.run(*data)
    return mcmc


def summary(mcmc):
    """What of a run can be compared, and comes over to another process."""
    diagnostics = mcmc.diagnostics()
    return {
        "chains": list(mcmc.chains),
        "draws": {name: value.clone() for name, value in mcmc.get_samples(group_by_chain=True).items()},
        "divergences": diagnostics["divergences"],
        "potential": {name: value.clone() for name, value in diagnostics["potential"].items()},
        "diverged": [error.chain for error in mcmc.diverged],
    }


def assert_same(found, expected):
    assert found["chains"] == expected["chains"]
    assert found["divergences"] == expected["divergences"]
    assert found["diverged"] == expected["diverged"]
    for part in ("draws", "potential"):
        assert list(found[part]) == list(expected[part])
        for name, value in expected[part].items():
            assert torch.equal(found[part][name], value), (part, name)


def kernels():
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(60, 4, generator=generator), torch.randint(3, (60,), generator=generator)
    options = {"thinning": 3, "seed": 7}
    conjugate = Conjugate(dtype=torch.float64)
    return {
        "SGLD": (SGLD(Classifier(), 1e-3, batch_size=10, **options), (x, y)),
        "SGHMC": (SGHMC(Classifier(), 1e-3, batch_size=10, **options), (x, y)),
        "PSGLD": (PSGLD(MODEL.subsampling, 1e-3, **options), (MODEL.x, MODEL.y)),
        "float64": (SGLD(conjugate.full, 1e-3, batch_size=10, **options), (conjugate.x, conjugate.y)),
        "constrained": (SGLD(constrained, 1e-3, **options), (torch.randn(20, generator=generator),)),
        "warm start": (SGLD(Classifier(), 1e-3, batch_size=10, warm_start=5, **options), (x, y)),
    }


@pytest.mark.parametrize("size", [2, 3])
def test_draws_do_not_depend_on_the_number_of_processes(size, tmp_path):
    def on_rank(rank):
        return {name: summary(run(kernel, data, num_chains=5)) for name, (kernel, data) in kernels().items()}

    first, *others = on_ranks(on_rank, size, tmp_path)
    for name, (kernel, data) in kernels().items():
        assert_same(first[name], summary(run(kernel, data, num_chains=5)))
        vectorised = run(kernel, data, num_chains=5, method="vectorized").get_samples(group_by_chain=True)
        assert all(torch.equal(first[name]["draws"][site], value) for site, value in vectorised.items())
        parts = [other[name] for other in others]
        assert [c for part in parts for c in part["chains"]] == list(range(3 if size == 2 else 2, 5))
        for part in parts:
            for site, value in part["draws"].items():
                assert torch.equal(value, first[name]["draws"][site][part["chains"]])
