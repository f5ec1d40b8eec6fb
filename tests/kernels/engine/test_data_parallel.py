# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What processes with some of the rows add up to is the potential of all rows, in every mini-batch style."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pyro_apd.data.minibatch import FullBatch
from pyro_apd.kernels import SGHMC, SGLD
from pyro_apd.kernels.engine.chain_set import ChainSet
from pyro_apd.kernels.engine.data_parallel import DataParallelGradient
from pyro_apd.models.building import build_potential
from pyro_apd.runtime.ranks import Ranks, join_process_group
from tests.support.models import Classifier, Conjugate, constrained
from tests.support.processes import on_ranks

MODEL = Conjugate(num_data=40, dtype=torch.float64)
THETA = torch.tensor([[0.3, -0.2, 1.0], [1.0, 0.0, -2.0]], dtype=torch.float64)
ROWS = [slice(0, 24), slice(24, 40)]


def loader(x, y):
    return DataLoader(TensorDataset(x, y), batch_size=4)


def potentials(x, y):
    """Of some rows, by style of their mini-batches."""

    def subsampling(x, y):
        w = MODEL.weights()
        with pyro.plate("data", len(x), subsample_size=4):
            batch, target = pyro.subsample(x, event_dim=1), pyro.subsample(y, event_dim=0)
            pyro.sample("obs", dist.Normal(batch @ w, 1.0), obs=target)

    def stating_size(batch, target):
        w = MODEL.weights()
        with pyro.plate("data", len(x), subsample_size=len(batch)):
            pyro.sample("obs", dist.Normal(batch @ w, 1.0), obs=target)

    return {
        "full": build_potential(MODEL.full, (x, y), {})[0],
        "rows": build_potential(MODEL.full, (x, y), {}, batch_size=4)[0],
        "plate": build_potential(subsampling, (x, y), {})[0],
        "loader": build_potential(stating_size, (loader(x, y),), {})[0],
        "traced": build_potential(MODEL.full, (x, y), {}, batch_size=4, capture=False)[0],
    }


def mean_gradient(estimator, source, theta):
    """Of U and U over batches that cover the data once."""
    batches = [((), 1.0)] if isinstance(source, FullBatch) else list(source.cover())
    gradient, energy = torch.zeros_like(theta), theta.new_zeros(len(theta))
    for inputs, weight in batches:
        stacked = tuple(t.expand(len(theta), *t.shape).contiguous() for t in inputs)
        part, part_energy = estimator.gradient(theta, stacked)
        gradient, energy = gradient + weight * part, energy + weight * part_energy
    return gradient, energy


@pytest.mark.parametrize("style", ["full", "rows", "plate", "loader", "traced"])
def test_the_prior_alone(style):
    potential = potentials(MODEL.x, MODEL.y)[style]
    gradient, energy = potential.prior_alone().gradient(THETA, ())
    torch.testing.assert_close(gradient, THETA)
    torch.testing.assert_close(energy, 0.5 * THETA.square().sum(-1) + 1.5 * torch.log(torch.tensor(2 * torch.pi)))


def test_the_prior_alone_of_constrained_sites_and_networks():
    """Two data sets have the same prior, and U is that and the likelihood."""
    for model, one, two in (
        (constrained, (torch.randn(5),), (torch.randn(9),)),
        (Classifier(), (torch.randn(5, 4), torch.randint(3, (5,))), (torch.randn(9, 4), torch.randint(3, (9,)))),
    ):
        first, second = (build_potential(model, args, {}, capture=False)[0] for args in (one, two))
        theta = torch.randn(first.layout.size)
        found, again = (p.prior_alone().gradient(theta, ()) for p in (first, second))
        torch.testing.assert_close(found, again)
        assert not torch.allclose(found[0], first.gradient(theta, ())[0])


def test_one_process_is_the_potential_itself():
    part = build_potential(MODEL.full, (MODEL.x, MODEL.y), {})[0]
    split = DataParallelGradient(part, Ranks())
    assert all(torch.equal(a, b) for a, b in zip(split.gradient(THETA, ()), part.gradient(THETA, ()), strict=True))
    assert split.num_data == 40
    assert ChainSet(data_ranks=Ranks()).same_on_data_ranks(3) == 3


@pytest.mark.slow
def test_the_sum_over_processes_is_exact(tmp_path):
    def on_rank(rank):
        ranks, rows = join_process_group(), ROWS[rank]
        parts = potentials(MODEL.x[rows], MODEL.y[rows])
        counts = [DataParallelGradient(part, ranks).num_data for part in parts.values()]
        # As many batches on both, or one would wait.
        even = potentials(MODEL.x[rank::2], MODEL.y[rank::2])
        same = {"full": parts["full"]} | {f"even {name}": part for name, part in even.items()}
        return counts, {
            name: mean_gradient(DataParallelGradient(part, ranks), part.source, THETA) for name, part in same.items()
        }

    (counts, first), (_, second) = on_ranks(on_rank, 2, tmp_path)
    assert counts == [40] * 5
    whole = potentials(MODEL.x, MODEL.y)["full"]
    expected = mean_gradient(whole, whole.source, THETA)
    for name, found in first.items():
        torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")
        assert all(torch.equal(a, b) for a, b in zip(found, second[name], strict=True))


def draws(kernel, x, y, ranks=None, num_draws=12):
    chain = kernel.begin((x, y), {}, warmup_steps=6, num_samples=num_draws, chains=ChainSet(count=2, data_ranks=ranks))
    found = []
    for i in range(num_draws):
        if i == 6:
            chain.end_warmup()
        chain.advance(kernel.thinning)
        chain.observe()
        found.append(chain.theta)
    return torch.stack(found), chain.step_size


@pytest.mark.slow
def test_chains_are_those_of_all_rows_and_go_in_step(tmp_path):
    options = {"thinning": 20, "seed": 3}

    def on_rank(rank):
        ranks, rows = join_process_group(), ROWS[rank]
        x, y = MODEL.x[rows], MODEL.y[rows]
        full = draws(SGHMC(MODEL.full, 1e-3, **options), x, y, ranks)
        auto = draws(SGLD(MODEL.full, "auto", batch_size=5, **options), x, y, ranks)
        with pytest.raises(ValueError, match="control_variates=True and split='data' cannot be combined"):
            draws(SGLD(MODEL.full, 1e-3, batch_size=5, control_variates=True), x, y, ranks)
        return full, auto

    first, second = on_ranks(on_rank, 2, tmp_path)
    for (found, step_size), (other, other_step_size) in zip(first, second, strict=True):
        assert torch.equal(found, other)
        assert step_size == other_step_size
    expected, _ = draws(SGHMC(MODEL.full, 1e-3, **options), MODEL.x, MODEL.y)
    torch.testing.assert_close(first[0][0], expected, rtol=1e-9, atol=1e-9)
