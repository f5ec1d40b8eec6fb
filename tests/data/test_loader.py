# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import copy
import random
import threading
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from pyro_apd.data import loader as module
from pyro_apd.data.loader import LoaderBatches, is_loader, refuse_worker_processes
from pyro_apd.errors import DataError
from pyro_apd.runtime.prefetch import THREAD_NAME

X, Y = torch.arange(20.0).reshape(10, 2), torch.arange(10)


def started(source, seed=0):
    source.start(torch.Generator().manual_seed(seed))
    return source


def test_loader_shuffles_by_seed_and_leaves_the_global_generator_alone():
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    before = torch.get_rng_state()
    runs = []
    for seed in (1, 1, 2):
        source = started(LoaderBatches(loader, {}, None), seed)
        runs.append(torch.cat([source.draw()[1] for _ in range(6)]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_global_generator_is_not_used_while_a_batch_is_read():
    """Another thread may draw from it meanwhile."""
    torch.manual_seed(3)
    before, unchanged = torch.get_rng_state(), []

    class Watching(Dataset):
        def __len__(self):
            return len(X)

        def __getitem__(self, i):
            unchanged.append(torch.equal(torch.get_rng_state(), before))
            return X[i] + torch.randn(()), Y[i]

    source = started(LoaderBatches(DataLoader(Watching(), batch_size=4, shuffle=True), {}, None))
    batch = source.draw()[0]
    assert torch.equal(batch, started(source).draw()[0])
    assert all(unchanged)


@pytest.mark.parametrize("batch_size", [2, 3, 4])
def test_loader_scale_makes_the_mean_over_an_epoch_exact(batch_size):
    source = started(LoaderBatches(DataLoader(TensorDataset(X), batch_size=batch_size), {}, None))
    num_batches = -(-10 // batch_size)
    batches = [source.draw() for _ in range(num_batches)]
    estimate = torch.stack([source.scale(b) * b[0].sum(0) for b in batches]).mean(0)
    torch.testing.assert_close(estimate, X.sum(0))


@pytest.mark.parametrize(("shuffle", "scale"), [(True, 2.5), (False, 2.0)])
def test_loader_that_drops_rows_scales_to_those_that_come(shuffle, scale):
    """In a fixed order the last two of ten rows never come."""
    loader = DataLoader(TensorDataset(X), batch_size=4, drop_last=True, shuffle=shuffle)
    source = started(LoaderBatches(loader, {}, None))
    assert source.scale(source.draw()) == scale


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], {"x": X, "y": Y}])
def test_batches_become_arguments_of_the_model(batch):
    source = started(LoaderBatches([batch], {"z": 1}, 10))
    call = source.bind(source.draw())
    given_x, given_y = (call.kwargs["x"], call.kwargs["y"]) if isinstance(batch, dict) else call.args
    assert torch.equal(given_x, X)
    assert torch.equal(given_y, Y)
    assert call.kwargs["z"] == 1


def test_loader_errors():
    with pytest.raises(ValueError, match="num_data=N"):
        LoaderBatches(iter([X]), {}, None)
    source = started(LoaderBatches(iter([(X,)]), {}, 10))
    source.draw()
    with pytest.raises(DataError, match="exhausted"):
        source.draw()
    with pytest.raises(DataError, match="entry #1 is a str"):
        started(LoaderBatches([(X, "label")], {}, 10)).draw()


def test_worker_processes_are_refused_where_chains_have_processes():
    with pytest.raises(ValueError, match=r"num_workers=1.*num_workers=0"):
        refuse_worker_processes((DataLoader(TensorDataset(X), num_workers=1),))
    refuse_worker_processes((DataLoader(TensorDataset(X)),))
    refuse_worker_processes((X, Y))


def test_what_counts_as_a_loader():
    loader = DataLoader(TensorDataset(X), batch_size=4)
    assert is_loader((loader,), None)
    assert is_loader((iter(loader),), None)
    assert is_loader(([(X,)],), 10)
    assert not is_loader(([(X,)],), None)  # a model may take a list
    assert not is_loader((X,), 10)
    assert not is_loader((X.numpy(),), 10)
    assert not is_loader((loader, X), None)


class Noisy(Dataset):
    """Adds noise of a global generator to each item, as augmentations do."""

    def __init__(self, noise=torch.randn):
        self.noise = noise

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i] + self.noise(2), Y[i]


def items():
    return [(X[i], Y[i]) for i in range(10)]


LOADERS = {
    "tensors": lambda: DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True),
    "tensors in order": lambda: DataLoader(TensorDataset(X, Y), batch_size=3, drop_last=True),
    "items": lambda: DataLoader(items(), batch_size=4, shuffle=True),
    "one batch": lambda: DataLoader(items(), batch_size=10, shuffle=True),
    "with replacement": lambda: DataLoader(
        TensorDataset(X, Y), batch_size=4, sampler=RandomSampler(X, replacement=True, num_samples=10)
    ),
    "noise": lambda: DataLoader(Noisy(), batch_size=4, shuffle=True),
    "noise of numpy": lambda: DataLoader(Noisy(lambda n: np.random.rand()), batch_size=4),  # noqa: NPY002
    "noise of Python": lambda: DataLoader(Noisy(lambda n: random.random()), batch_size=4),
    "list": lambda: [(X[:5], Y[:5]), (X[5:], Y[5:])],
}


def opened(name, prefetch, num_chains=None):
    source = LoaderBatches(LOADERS[name](), {}, 10 if name == "list" else None)
    source.prefetch, source.at_once = prefetch, 1 + prefetch // 2
    generators = [torch.Generator().manual_seed(i) for i in range(num_chains or 1)]
    source.start(generators if num_chains else generators[0])
    return source


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


@pytest.mark.parametrize("name", [name for name in LOADERS if " of " not in name])
@pytest.mark.parametrize("num_chains", [None, 2])
def test_reading_ahead_changes_no_batch_and_no_state(name, num_chains):
    # All chains' batches must have one shape.
    count = 2 if num_chains else 12
    plain, early = opened(name, 0, num_chains), opened(name, 3, num_chains)
    before = torch.get_rng_state()
    for _ in range(count):
        for a, b in zip(plain.draw(), early.draw(), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), before)
    resumed = opened(name, 3, num_chains)
    resumed.load_state_dict(early.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(resumed.draw(), plain.draw(), strict=True))
    for source in (early, resumed):
        source.close()
    assert not reading_threads()


def test_who_draws_from_the_global_generator_is_read_in_the_calling_thread():
    loaders = {
        "items": True,
        "noise": False,
        "noise of numpy": False,
        "noise of Python": False,
    }
    for name, draws_nothing in loaders.items():
        source = opened(name, 3)
        for _ in range(6):
            source.draw()
        assert source._draws_nothing is draws_nothing
        assert len(reading_threads()) == draws_nothing
        source.close()


def test_batches_of_a_tensor_dataset_are_those_of_the_loader():
    """They are taken by another way: the same tensors, in epochs that are shuffled by the same draws."""

    def epochs(loader, iterate):
        torch.manual_seed(3)
        return [tensor for _ in range(2) for batch in iterate(loader) for tensor in batch]

    for name in ("tensors", "tensors in order"):
        loader = LOADERS[name]()
        plain, ours = epochs(loader, iter), epochs(loader, module._epoch)
        assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
        assert not hasattr(module._epoch(loader), "_next_data"), "it is the loader's own iterator"


@pytest.mark.parametrize("ahead", [0, 3])
def test_errors_of_a_loader_keep_their_message(ahead):
    class Broken(Noisy):
        def __getitem__(self, i):
            if i == 8:
                raise OSError("item 8 cannot be read")
            return X[i], Y[i]

    source = LoaderBatches(DataLoader(Broken(), batch_size=2), {}, None)
    source.prefetch = ahead
    started(source)
    for _ in range(4):
        source.draw()
    with pytest.raises(OSError, match="item 8 cannot be read"):
        source.draw()
    source.close()


def test_a_copy_does_not_read_while_its_original_does():
    """Data sets are rarely safe to be read by two threads at once."""
    inside = []

    class Watched(Noisy):
        def __getitem__(self, i):
            inside.append(i)
            assert len(inside) == 1
            time.sleep(0.001)
            inside.pop()
            return X[i], Y[i]

    source = LoaderBatches(DataLoader(Watched(), batch_size=2), {}, None)
    source.prefetch = 4
    started(source)
    other = copy.copy(source)
    other.prefetch = 0
    other.start(torch.Generator())
    for _ in range(8):
        source.draw()
        other.draw()
        next(source.cover())
    source.close()
