# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Which runs are the same, and which are others."""

import copy
import functools
import json
import math
import mmap
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_value
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from pyro_apd.chains.checkpoint import CheckpointError
from pyro_apd.chains.group import Plan
from pyro_apd.chains.identity import arguments_digest, check_identity, describe, run_identity, step_sizes
from pyro_apd.chains.settings import Settings
from pyro_apd.kernels import SGLD
from pyro_apd.kernels.engine.chain_set import ChainSet
from pyro_apd.kernels.engine.schedules import Constant, PolynomialDecay
from pyro_apd.models.bnn import BNN

PATH = "run.ckpt"
GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(60, 3, generator=GENERATOR), torch.randn(60, generator=GENERATOR)
LABELS = torch.arange(60) % 3
OTHER = X.clone()
OTHER[57, 1] += 1e-6


def network(activation=nn.ReLU, prior_scale=1.0, seed=0, freeze=False):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 6), activation(), nn.Linear(6, 3))
    net[0].requires_grad_(not freeze)
    return BNN(net, prior_scale=prior_scale)


def line(noise=1.0, location=0.0):
    """A regression that takes its constants from outside."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(location, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, noise), obs=y)

    return model


def subsampling(noise):
    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x), subsample_size=20):
            x_B, y_B = pyro.subsample(x, event_dim=1), pyro.subsample(y, event_dim=0)
            pyro.sample("obs", dist.Normal(x_B @ w, noise), obs=y_B)

    return model


def identity(model, *args, step_size=1e-5, **settings):
    kernel = SGLD(model, step_size, seed=0, **settings)
    chain = kernel.begin(args, {}, warmup_steps=10, num_samples=20, chains=ChainSet())
    return json.loads(json.dumps(run_identity(kernel, Settings(Plan(20, 10, 1), "vectorized"), chain, args, {})))


def of_network(**settings):
    return identity(network(**settings), X, LABELS, batch_size=20)


def of_loader(loader, **settings):
    return identity(line(), loader, **settings)


def assert_same(one, other):
    check_identity(PATH, one, other)
    check_identity(PATH, other, one)


def assert_other(one, other, message):
    with pytest.raises(CheckpointError, match=message) as error:
        check_identity(PATH, one, other)
    with pytest.raises(CheckpointError):
        check_identity(PATH, other, one)
    assert len(str(error.value)) < 1000
    assert "elete" not in str(error.value)


# -- models -----------------------------------------------------------------------------------------------------------


def test_a_model_that_is_made_again_is_the_same():
    assert_same(of_network(), of_network(seed=1))
    assert_same(of_network(freeze=True), of_network(freeze=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prior_scale": 0.05}, r"the prior of sites \[\"net.0.weight\", .* was .*, now"),
        ({"prior_scale": 1.001}, "the prior.* is another"),
        ({"activation": nn.Tanh}, r"the likelihood is another \(-log likelihood at a fixed point was .*, now"),
        ({"activation": nn.LeakyReLU}, "the likelihood is another"),
    ],
)
def test_another_prior_or_activation(changed, message):
    assert_other(of_network(), of_network(**changed), message)


def test_other_frozen_weights():
    assert_other(of_network(freeze=True), of_network(freeze=True, seed=1), "the likelihood is another")


@pytest.mark.parametrize("settings", [{}, {"batch_size": 20}])
def test_another_closure(settings):
    one = identity(line(), X, Y, **settings)
    assert_same(one, identity(line(), X, Y, **settings))
    assert_other(one, identity(line(noise=1.01), X, Y, **settings), "the likelihood is another")
    assert_other(one, identity(line(location=0.1), X, Y, **settings), r"the prior of sites \[\"w\"\] is another")


def test_a_model_that_subsamples_itself():
    assert_same(identity(subsampling(1.0), X, Y), identity(subsampling(1.0), X, Y))
    assert_other(identity(subsampling(1.0), X, Y), identity(subsampling(1.01), X, Y), "the likelihood is another")


def test_a_model_is_known_by_what_it_computes_and_not_by_its_name():
    assert_same(identity(line(), X, Y), identity(functools.partial(line()), X, Y))


def test_a_flat_prior():
    def flat(x, y=None):
        w = pyro.sample("w", dist.ImproperUniform(dist.constraints.real, (), (3,)))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    start = init_to_value(values={"w": torch.zeros(3)})
    one = identity(flat, X, Y, init_strategy=start)
    assert one["model"]["prior"]["gradient"] == {"w": [0, 0]}
    assert_other(one, identity(line(), X, Y, init_strategy=start), "the prior of sites")


def part(energy, **gradient):
    return {"energy": energy, "length": 1.0, "gradient": {name: [norm, 0.1 * norm] for name, norm in gradient.items()}}


def test_rounding_is_no_difference():
    values = {"prior": part(1000.0, w=5.0, v=1.0), "likelihood": part(-300.0, w=100.0, v=1e-3)}
    rounded = copy.deepcopy(values)
    for name, share in (("prior", 1e-6), ("likelihood", 1e-5)):
        rounded[name]["energy"] *= 1 + share
        rounded[name]["gradient"] = {
            site: [norm * (1 + share), along * (1 - share)] for site, (norm, along) in values[name]["gradient"].items()
        }
    rounded["likelihood"]["gradient"]["v"][0] *= 1.01  # which is little beside that of w
    assert_same({"model": values}, {"model": rounded})
    for name in values:
        for number in (0, 1):
            other = copy.deepcopy(values)
            other[name]["gradient"]["w"][number] += 0.01 * values[name]["gradient"]["w"][0]
            assert_other({"model": values}, {"model": other}, f"the {name}")
        other = copy.deepcopy(values)
        other[name]["energy"] += 1
        assert_other({"model": values}, {"model": other}, f"the {name} is another")
    other = {**rounded, "likelihood": part(-303.0, w=101.0, v=1e-3)}
    assert_same({"model": values, "dtype": "torch.bfloat16"}, {"model": other, "dtype": "torch.bfloat16"})


def test_rounding_of_a_large_prior_is_no_difference_of_a_small_likelihood():
    values = {"prior": part(1e9, w=1e6), "likelihood": part(100.0, w=1.0)}
    other = {**values, "likelihood": part(300.0, w=1.2)}
    assert_same({"model": values}, {"model": other})
    assert_other({"model": {**values, "prior": part(1e4, w=1.0)}}, {"model": other}, "the likelihood")


def test_energies_that_happen_to_be_small_are_compared_on_the_scale_of_their_gradients():
    values = {"prior": part(1.0, w=1.0), "likelihood": part(1e-3, w=1e4)}
    assert_same({"model": values}, {"model": {**values, "likelihood": part(0.1, w=1e4)}})
    assert_other({"model": values}, {"model": {**values, "likelihood": part(10.0, w=1e4)}}, "the likelihood")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_the_same_where_it_is_not_finite_again(value):
    values = {"prior": part(1.0, w=1.0), "likelihood": part(value, w=value)}
    assert_same({"model": values}, {"model": {**values, "likelihood": part(-math.inf, w=math.nan)}})
    assert_other({"model": values}, {"model": {**values, "likelihood": part(1.0, w=1.0)}}, "the likelihood")


# -- settings ---------------------------------------------------------------------------------------------------------


def test_another_run_is_refused_by_what_differs():
    run = {"kernel": "SGLD", "seed": 3, "layout": ["w[3]"]}
    check_identity(PATH, run, {**run, "layout": ("w[3]",)})
    assert_other(run, {**run, "seed": 4, "layout": ["v[3]"]}, r"seed was 3, now 4; layout was .*, now \[\"v\[3\]\"\]")
    assert_other(run, {**run, "thinning": 2}, "thinning was null, now 2")
    many = {f"setting {i}": "x" * 200 for i in range(30)}
    assert_other(run, {**run, **many}, "and 27 more")


def test_schedules_are_known_by_their_step_sizes():
    def decay(scale):
        return lambda step: scale * (1 + step) ** -0.55

    def of(step_size):
        return identity(line(), X, Y, step_size=step_size)

    assert_same(of(decay(1e-5)), of(functools.partial(decay(1e-5))))
    assert_same(of(decay(1e-5)), of(decay(1e-5 * (1 + 1e-12))))
    assert_other(of(decay(1e-5)), of(decay(1.1e-5)), "the step size at step 0 was 1e-05, now 1.1e-05")
    late = of(lambda step: 1e-5 if step < 29 else 5e-6)
    assert_other(of(lambda step: 1e-5), late, "the step size at step 29 was 1e-05, now 5e-06")
    assert_other(of(PolynomialDecay(1e-5)), of(PolynomialDecay(1e-5, gamma=0.6)), '"gamma": 0.55.*"gamma": 0.6')
    assert_other(of("auto"), of(1e-5), "step sizes was null, now")


def test_step_sizes_are_those_of_steps_all_over_the_run():
    assert list(step_sizes(Constant(1.0), 3)) == ["0", "1", "2"]
    steps = [int(step) for step in step_sizes(Constant(1.0), 30_000)]
    assert (len(steps), steps[0], steps[-1]) == (64, 0, 29_999)
    assert step_sizes(None, 3) is None


def test_settings_are_described_alike_in_every_process():
    assert describe(Constant(0.5)) == {"type": "Constant", "step_size": 0.5}
    assert describe(part) == "part"
    assert describe({"a": (1, None)}) == {"a": [1, None]}
    assert describe(object()) == "object"
    assert describe(np.float64(0.5)) == 0.5
    assert describe(torch.ones(2)) == describe(torch.ones(2)) != describe(torch.zeros(2))


# -- data -------------------------------------------------------------------------------------------------------------


class Rows:
    """Stored rows, given other ones at each reading where there is noise."""

    def __init__(self, rows, noise=0.0):
        self.rows, self.noise = rows.numpy(), noise

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index] + self.noise * np.random.standard_normal()  # noqa: NPY002 - the global generator


class Items(Rows, Dataset):
    """One row at a time, with its target."""

    def __getitem__(self, index):
        return super().__getitem__(index).astype("float32"), Y[index]


def test_digests_see_all_of_the_data():
    x, y = X[:20], LABELS[:20]
    seen = arguments_digest(((x, y), {"flag": True}))
    assert arguments_digest(((x.clone(), y), {"flag": True})) == seen
    assert arguments_digest(((x.T.contiguous().T, y), {"flag": True})) == seen
    changed = x.clone()
    changed[13, 1] += 1e-6
    others = [
        ((changed, y), {"flag": True}),
        ((x.T.contiguous(), y), {"flag": True}),
        ((x, y.int()), {"flag": True}),
        ((y, x), {"flag": True}),
        ((x, y), {"flag": False}),
        ((x, y), {"flags": True}),
        ((x,), {"flag": True}),
        ((np.float32(1.0),), {"flag": True}),
        ((np.float32(2.0),), {"flag": True}),
    ]
    assert len({seen, *map(arguments_digest, others)}) == 10


def test_large_tensors_are_read_in_parts(monkeypatch):
    monkeypatch.setattr("pyro_apd.chains.identity._BLOCK_BYTES", 64)
    seen = arguments_digest(X)
    assert arguments_digest(X.clone()) == seen
    assert arguments_digest(OTHER) != seen
    assert arguments_digest(torch.cat([X[:10], X[11:20], X[10:11], X[20:]])) != seen


def test_arrays_in_memory_are_read_as_a_whole_and_files_by_rows(tmp_path):
    rows = np.zeros((5000, 2), "float32")
    other = rows.copy()
    other[1] += 1
    assert arguments_digest(rows) != arguments_digest(other)
    assert arguments_digest(rows[10:]) != arguments_digest(other[1:4991])
    mapped = []
    for name, values in (("rows", rows), ("other", other), ("scaled", rows + 2)):
        values.tofile(tmp_path / name)
        mapped.append(np.memmap(tmp_path / name, "float32", "r", shape=rows.shape)[:4900])
    digests = list(map(arguments_digest, mapped))
    assert digests[0] == digests[1] != digests[2]
    with (tmp_path / "rows").open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    assert arguments_digest(np.frombuffer(mapping, "float32").reshape(rows.shape)[:4900]) == digests[0]


def test_other_data():
    one = identity(line(), X, Y, batch_size=20)
    assert_same(one, identity(line(), X.clone(), Y, batch_size=20))
    assert_other(one, identity(line(), OTHER, Y, batch_size=20), "argument #0 of the model was given other data")
    stored = identity(line(), Rows(X), Y, batch_size=20)
    assert_same(stored, identity(line(), Rows(X), Y, batch_size=20))
    assert_other(stored, identity(line(), Rows(X + 1e-6), Y, batch_size=20), "argument #0 of the model")


def test_stored_rows_that_differ_at_each_reading():
    one, again = (identity(line(), Rows(X, noise=1e-2), Y, batch_size=20) for _ in range(2))
    assert_same(one, again)
    assert one["model"]["likelihood"] is None
    assert_other(one, identity(line(noise=1.0, location=1.0), Rows(X, noise=1e-2), Y, batch_size=20), "the prior")


@pytest.mark.parametrize("dataset", [TensorDataset, lambda *t: Subset(TensorDataset(*t), range(5, 60))])
def test_digests_see_into_loaders(dataset):
    def of(x, **settings):
        return arguments_digest(DataLoader(dataset(x, Y), **{"batch_size": 4, **settings}))

    assert of(X) == of(X.clone()) == of(X, num_workers=0)
    both = ConcatDataset([dataset(X, Y), dataset(OTHER, Y)])
    assert len({of(X), of(OTHER), of(X, batch_size=5), of(X, shuffle=True), arguments_digest(both)}) == 5
    assert arguments_digest(Subset(both, [1, 2])) != arguments_digest(Subset(both, [1, 3]))


@pytest.mark.parametrize("parts", [lambda d: d, lambda d: Subset(d, range(50)), lambda d: ConcatDataset([d, d])])
def test_digests_see_all_items_of_a_dataset(parts):
    def of(x, noise=0.0):
        return arguments_digest(DataLoader(parts(Items(x, noise)), batch_size=4))

    changed = X.clone()
    changed[7] += 1e-3  # in no batch that is looked at otherwise
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    assert of(X) == of(X.clone()) != of(changed)
    assert of(X, noise=0.1) == of(changed, noise=0.1)  # others at each reading
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_loaders_that_are_made_again_are_the_same():
    def loader(x, noise=0.0, **settings):
        return DataLoader(Items(x, noise), batch_size=20, shuffle=True, **settings)

    one = of_loader(loader(X))
    assert_same(one, of_loader(loader(X)))
    assert_other(one, of_loader(loader(X + 0.1)), "the likelihood is another")
    assert_other(one, of_loader(loader(X, noise=0.1)), "first batch of the data now differs from call to call")
    assert_same(of_loader(loader(X, noise=0.1)), of_loader(loader(X, noise=0.1)))
    # Whose generator has moved on since.
    kept = loader(X, generator=torch.Generator().manual_seed(1))
    assert_same(of_loader(kept), of_loader(kept))


def test_no_batch_of_an_iterator_is_taken():
    taken = []

    def batches():
        for start in 3 * (0, 20, 40):
            taken.append(start)
            yield X[start : start + 20], Y[start : start + 20]

    kernel = SGLD(line(), 1e-5, seed=0, num_data=60)
    args = (batches(),)
    chain = kernel.begin(args, {}, warmup_steps=10, num_samples=20, chains=ChainSet())
    before = len(taken)
    found = run_identity(kernel, Settings(Plan(20, 10, 1), "vectorized"), chain, args, {})
    assert (found["model"], len(taken)) == (None, before)
    assert re.fullmatch(".*model", found["kernel.model"])
