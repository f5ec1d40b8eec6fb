# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Reading draws, and refusing what no generator can be fitted to."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_apd.chains.driver import MCMC
from pyro_apd.chains.stores.base import STATISTICS
from pyro_apd.chains.stores.disk import DiskStore, open_store
from pyro_apd.distillation.source import read_source, split_held_out
from pyro_apd.errors import ArtifactError
from pyro_apd.kernels import SGLD
from pyro_apd.models.frozen import FrozenTensors
from pyro_apd.models.layout import Layout
from tests.support.models import Classifier, constrained

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


class FakeMCMC:
    """What distillation reads of Pyro's MCMC."""

    def __init__(self, draws, kernel=None, args=()):
        self._samples, self.kernel, self._args, self._kwargs = draws, kernel, args, {}

    def get_samples(self, group_by_chain=False):
        return {k: v if group_by_chain else v.flatten(0, 1) for k, v in self._samples.items()}


class FakeKernel:
    def __init__(self, model, layout=None):
        self.model, self.layout = model, layout


def draws(num=20, **shapes):
    return {name: torch.randn(num, *shape) for name, shape in (shapes or {"w": (2, 3), "b": ()}).items()}


def test_dict_is_one_chain():
    source = read_source(draws())
    assert source.theta_CSD.shape == (1, 20, 7)
    assert source.model is None
    assert source.args is None


def test_dict_by_chain():
    grouped = {"w": torch.randn(3, 10, 2), "b": torch.randn(3, 10)}
    theta_CSD = read_source(grouped, group_by_chain=True).theta_CSD
    assert torch.equal(theta_CSD[2, 4], torch.cat([grouped["w"][2, 4], grouped["b"][2, 4, None]]))


def test_mcmc_brings_model_and_arguments():
    model = Classifier()
    shapes = {"first.weight": (6, 4), "first.bias": (6,), "second.weight": (3, 6), "second.bias": (3,)}
    grouped = {name: torch.randn(2, 10, *shape) for name, shape in shapes.items()}
    source = read_source(FakeMCMC(grouped, FakeKernel(model), (X,)))
    assert source.model is model
    assert source.args == (X,)
    assert source.layout.names == tuple(shapes)


def test_supports_come_from_the_model():
    y = torch.zeros(5)
    values = {
        "scale": torch.rand(12) + 0.1,
        "mix": torch.distributions.Dirichlet(torch.ones(3)).sample((12,)),
        "corr": torch.linalg.cholesky(torch.tensor([[1.0, 0.3], [0.3, 1.0]])).expand(12, 2, 2).contiguous(),
    }
    source = read_source(values, constrained, (y,))
    assert source.layout["mix"].support is constraints.simplex
    assert source.theta_CSD.shape == (1, 12, 1 + 2 + 1)


class Counting(pyro.nn.PyroModule):
    """Keeps the numbers of rows that it was run on. A parameter is frozen; a latent has one entry, or one per row."""

    def __init__(self, num_local=0):
        super().__init__()
        self.centre = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
        self.num_local, self.seen = num_local, []

    def forward(self, x):
        self.seen.append(len(x))
        w = pyro.sample("w", dist.Normal(self.centre, 1.0).to_event(1))
        size = (self.num_local and len(x)) or 1
        pyro.sample("local", dist.HalfNormal(torch.ones(size)).to_event(1))
        return x @ w


def test_sites_and_frozen_tensors_are_found_on_a_few_rows_of_many():
    model = Counting()
    source = read_source({"w": torch.randn(12, 3), "local": torch.rand(12, 1)}, model, (torch.randn(50_000, 3),))
    assert not source.layout["local"].is_real
    assert set(source.frozen_tensors().read) == {"centre"}
    assert max(model.seen) < 10


def test_latents_with_a_row_each_take_all_rows():
    model = Counting(num_local=1)
    source = read_source({"w": torch.randn(12, 3), "local": torch.rand(12, 40)}, model, (torch.randn(40, 3),))
    assert source.layout["local"].shape == (40,)
    assert not source.layout["local"].is_real


def test_without_a_model_sites_are_real_and_this_is_said(caplog):
    with caplog.at_level("INFO", "pyro_apd"):
        assert read_source(draws()).layout.is_real
    assert "every site counts as real" in caplog.text


@pytest.mark.parametrize("num_draws", [25, 57, 250, 1000])
def test_held_out_runs(num_draws):
    train, held_out = split_held_out(num_draws)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(num_draws))
    assert len(held_out) == pytest.approx(0.2 * num_draws, abs=4)
    assert held_out[:5].tolist() == [10, 11, 12, 13, 14]


def test_held_out_draws_are_spread_over_a_chain_that_moves():
    path = torch.linspace(0, 1, 250)
    _, held_out = split_held_out(250)
    assert path[held_out].mean().item() == pytest.approx(path.mean().item(), abs=0.01)
    assert path[held_out].std().item() == pytest.approx(path.std().item(), rel=0.02)


def test_a_very_short_chain_is_judged_on_itself():
    train, held_out = split_held_out(24)
    assert train.tolist() == held_out.tolist() == list(range(24))


def spoiled(value):
    bad = draws()
    bad["w"][3, 0, 0] = value
    return bad


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "at least one site"),
        (draws(9), "holds too few draws: 9 .* at least 10.*pass group_by_chain=True"),
        ({**draws(), "b": torch.randn(19)}, "different numbers of draws"),
        (spoiled(torch.nan), "site 'w' hold 1 NaN"),
        (spoiled(torch.inf), "site 'w' hold 1 NaN"),
        ({"w": torch.ones(20, 2, dtype=torch.int64)}, "site 'w' are torch.int64"),
        ({"w": [1.0, 2.0]}, r"'w'\]` must be a tensor.*got list"),
        ({"w": torch.tensor(1.0)}, r"'w'\]` must be a tensor"),
        (FakeMCMC(None), "no draws yet"),
    ],
)
def test_draws_that_cannot_be_distilled(source, message):
    with pytest.raises(ValueError, match=message):
        read_source(source)


def test_neither_mcmc_nor_dict():
    with pytest.raises(TypeError, match="must be an MCMC after run"):
        read_source([1, 2, 3])


def test_data_that_are_not_a_tuple():
    with pytest.raises(TypeError, match="`data` must be the tuple"):
        read_source(draws(), Classifier(), X)


def test_sites_that_the_model_does_not_have():
    with pytest.raises(ValueError, match="no latent sites"):
        read_source(draws(), Classifier(), (X,))


def test_draws_of_another_shape_than_the_models():
    shapes = {"first.weight": (5, 4), "first.bias": (6,), "second.weight": (3, 6), "second.bias": (3,)}
    with pytest.raises(ValueError, match=r"first\.weight"):
        read_source(draws(20, **shapes), Classifier(), (X,))


def test_draws_on_the_edge_of_their_support():
    values = {"scale": torch.zeros(12), "mix": torch.full((12, 3), 1 / 3), "corr": torch.eye(2).expand(12, 2, 2)}
    with pytest.raises(ValueError, match="'scale' lie on or outside the boundary"):
        read_source(values, constrained, (torch.zeros(5),))


def stored(path, num_draws=20, value=0.0):
    """A store of two chains, on disk."""
    layout = Layout({"w": (2, 3), "scale": ()}, {"scale": constraints.positive})
    store = DiskStore.create(path, layout, 2, num_draws, torch.float32)
    for draw in range(num_draws):
        theta_CD = torch.full((2, 7), float(draw))
        theta_CD[1, -1] = value
        store.write(0, draw, theta_CD, dict.fromkeys(STATISTICS, 1.0))
    store.close()
    return open_store(path)


def test_draws_of_a_store_are_not_copied(tmp_path):
    store = stored(tmp_path / "s")
    mcmc = FakeMCMC(store.get_samples(group_by_chain=True), FakeKernel(Classifier()), (X,))
    mcmc.store = store
    for source in (read_source(store), read_source(mcmc)):
        assert source.theta_CSD.data_ptr() == store.theta_CSD.data_ptr()
        assert source.layout["scale"].support is constraints.positive
        assert torch.equal(source.layout.constrain(source.theta_CSD)["scale"], store.samples()["scale"])
    assert source.args == (X,)


class Frozen(torch.nn.Module):
    """A backbone before the latents of :func:`stored`."""

    def __init__(self, factor):
        super().__init__()
        self.register_buffer("factor", torch.full((3,), factor))

    def forward(self, x):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(w[0] @ self.factor, 1.0), obs=x)


def test_draws_in_files_know_the_frozen_weights_of_their_model(tmp_path):
    store, x = stored(tmp_path / "s"), torch.zeros(5)
    known = FrozenTensors.of(Frozen(2.0), store.layout.names, (x,))
    store.info["frozen"] = known.to_json()
    assert read_source(store, Frozen(2.0), (x,)).frozen_tensors().read == known.read
    with pytest.raises(ArtifactError, match=r"other frozen weights.*'factor'"):
        read_source(store, Frozen(3.0), (x,))
    assert read_source(store).frozen_tensors() == FrozenTensors(known.read, known.unread)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_draws_in_memory_know_the_frozen_weights_of_their_model(batch_size):
    model, x = Frozen(2.0), torch.zeros(5)
    mcmc = MCMC(SGLD(model, 1e-6, batch_size=batch_size, seed=0), num_samples=10, warmup_steps=0, disable_progbar=True)
    mcmc.run(x)
    read_source(mcmc)
    with pytest.raises(ArtifactError, match=r"other frozen weights.*'factor'"):
        read_source(mcmc, Frozen(3.0), (x,))
    model.factor += 1
    with pytest.raises(ArtifactError, match=r"other frozen weights.*'factor'"):
        read_source(mcmc)


def test_unfit_stores(tmp_path):
    with pytest.raises(ValueError, match="'scale' hold 20 NaN or infinite"):
        read_source(stored(tmp_path / "s", value=float("nan")))
    with pytest.raises(ValueError, match="too few draws: 8"):
        read_source(stored(tmp_path / "t", num_draws=4))


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e18), (torch.float32, 1e-25), (torch.float64, 1e150)])
def test_draws_whose_squares_are_no_numbers_are_refused(dtype, scale):
    draws = {"a": torch.randn(20, 3, dtype=dtype), "b": scale * torch.ones(20, 2, dtype=dtype)}
    with pytest.raises(ValueError, match=r"site 'b' are up to 1e[+-]\d+ .*are accepted"):
        read_source(draws)
    read_source({**draws, "b": 0 * draws["b"]})
    read_source({**draws, "b": draws["b"] / scale * 1e14})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_draws_in_half_precision_are_refused(dtype):
    with pytest.raises(ValueError, match=f"site 'a' are {dtype}; .* float32 or float64"):
        read_source({"a": torch.randn(20, 3).to(dtype)})
