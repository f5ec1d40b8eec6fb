# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The N of a loader is the number of rows that its epochs draw from; what does not show it must state it."""

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from pyro_apd.data.epochs import epoch_of
from pyro_apd.data.loader import LoaderBatches
from pyro_apd.errors import DataError

X = torch.arange(40.0).reshape(20, 2)
DATA = TensorDataset(X)
HALF = list(range(0, 20, 2))


def grouped(*sizes):
    """A batch sampler of another type, with batches of these sizes."""

    class Grouped:
        def __len__(self):
            return len(sizes)

        def __iter__(self):
            return iter(torch.randperm(20)[: sum(sizes)].split(list(sizes)))

    return Grouped()


class Shuffled:
    """A sampler of another type that draws each row once."""

    def __init__(self, repeats=0):
        self.repeats = repeats

    def __len__(self):
        return 20

    def __iter__(self):
        rows = torch.randperm(20)
        rows[: self.repeats] = 0
        return iter(rows.tolist())


class Drawn:
    """A sampler of another type: rows drawn with these weights, or each row three times."""

    def __init__(self, weights, sizes=None):
        self.weights, self.sizes = weights, sizes

    def __len__(self):
        return 20

    def __iter__(self):
        rows = torch.arange(60) // 3 if self.weights is None else torch.multinomial(self.weights, 20, True)
        return iter(rows.tolist() if self.sizes is None else rows.split(self.sizes))


class Pairs(Shuffled):
    """A sampler whose items are no indices of rows."""

    def __iter__(self):
        return iter([(row, 0) for row in range(20)])


ONE_MORE_OFTEN = torch.ones(20).index_fill(0, torch.tensor([7]), 1.5)
BALANCED = torch.tensor([1.0] * 16 + [4.0] * 4)  # classes of 16 and 4 rows


def random_rows(**settings):
    return DataLoader(DATA, 6, sampler=RandomSampler(DATA, **settings))


# The loader, its N, the batches of an epoch that holds each row once, and the rows that an epoch must have.
LOADERS = {
    "in order": (DataLoader(DATA, 6), 20, 4, 20),
    "in order, without the last": (DataLoader(DATA, 6, drop_last=True), 18, 3, 18),
    "shuffled": (DataLoader(DATA, 6, shuffle=True), 20, 4, 20),
    "shuffled, without the last": (DataLoader(DATA, 6, shuffle=True, drop_last=True), 20, None, 18),
    "independent rows": (random_rows(replacement=True), 20, None, 20),
    "more independent rows": (random_rows(replacement=True, num_samples=50), 20, None, 50),
    "part of a permutation": (random_rows(num_samples=19), 20, None, 19),
    "two permutations": (random_rows(num_samples=40), 20, None, 40),
    "rows of another length": (DataLoader(DATA, 6, sampler=RandomSampler(range(8))), 8, 2, 8),
    "first rows": (DataLoader(DATA, 6, sampler=SequentialSampler(range(8))), 8, 2, 8),
    "subset": (DataLoader(DATA, 4, sampler=SubsetRandomSampler(HALF)), 10, 3, 10),
    "subset, without the last": (
        DataLoader(DATA, 4, sampler=SubsetRandomSampler(HALF), drop_last=True),
        10,
        None,
        8,
    ),
    "list": (DataLoader(DATA, 4, sampler=HALF), 10, 3, 10),
    "list, without the last": (DataLoader(DATA, 4, sampler=HALF, drop_last=True), 8, 2, 8),
    "tensor": (DataLoader(DATA, 4, sampler=torch.arange(8)), 8, 2, 8),
    "batches of a sampler": (
        DataLoader(DATA, batch_sampler=BatchSampler(SubsetRandomSampler(HALF), 4, False)),
        10,
        3,
        10,
    ),
    "indices of batches": (
        DataLoader(DATA, batch_size=None, sampler=BatchSampler(RandomSampler(DATA), 6, False)),
        20,
        4,
        20,
    ),
    "equal weights": (
        DataLoader(DATA, 6, sampler=WeightedRandomSampler(torch.ones(20), 20)),
        20,
        None,
        20,
    ),
    "a sampler of another type": (DataLoader(DATA, 6, sampler=Shuffled()), 20, 4, 20),
    "another type, without the last": (DataLoader(DATA, 6, sampler=Shuffled(), drop_last=True), 20, None, 18),
    "another type, independent rows": (DataLoader(DATA, 6, sampler=Drawn(torch.ones(20))), 20, None, 20),
    "another type, each row thrice": (DataLoader(DATA, 6, sampler=Drawn(None)), 20, None, 60),
    "part for a process": (DataLoader(DATA, 6, sampler=DistributedSampler(DATA, 2, 0, shuffle=False)), 10, 2, 10),
    "a batch sampler of another type": (DataLoader(DATA, batch_sampler=grouped(3, 7, 9, 1)), 20, 4, 20),
    "batches in a list": ([(X[:12],), (X[12:],)], 20, 2, 20),
}


@pytest.mark.parametrize("name", LOADERS)
def test_epochs_of_loaders(name):
    loader, num_data, num_batches, num_rows = LOADERS[name]
    before = torch.get_rng_state()
    for stated in (None, num_data):
        epoch = epoch_of(loader, stated)
        assert (epoch.num_data, epoch.num_batches, epoch.num_rows) == (num_data, num_batches, num_rows)
        assert epoch.is_shown
    with pytest.raises(ValueError, match=f"num_data=21, but .* draw from {num_data} rows"):
        epoch_of(loader, 21)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", [name for name, (_, _, num_batches, _) in LOADERS.items() if num_batches])
def test_the_mean_over_an_epoch_is_the_sum_over_its_rows(name):
    loader, num_data, num_batches, _ = LOADERS[name]
    source = LoaderBatches(loader, {}, None)
    source.start(torch.Generator().manual_seed(0))
    batches = [source.draw()[0] for _ in range(2 * num_batches)]  # the second epoch begins: rows were counted
    estimate = sum(source.scale((rows,)) * rows[:, 0].sum() for rows in batches[:num_batches]) / num_batches
    rows = torch.cat(batches[:num_batches])
    assert len(rows) == num_data
    assert float(estimate) == pytest.approx(float(rows[:, 0].sum()))


def test_rows_that_never_come_are_said(caplog):
    epoch_of(LOADERS["shuffled, without the last"][0], None)
    assert not caplog.records
    epoch_of(LOADERS["in order, without the last"][0], None)
    assert "draw from 18 of the 20 rows" in caplog.text


class Stream(IterableDataset):
    def __init__(self, size, count=20, items=X):
        self.size, self.count, self.items = size, count, items

    def __len__(self):
        if self.size is None:
            raise TypeError
        return self.size

    def __iter__(self):
        return iter(self.items[: self.count])


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (DataLoader(DATA, 6, sampler=WeightedRandomSampler(torch.arange(20.0), 20)), r"poutine\.scale"),
        (DataLoader(DATA, 6, sampler=[0, 1, 1, 2]), "hold row 1 2 times"),
        (DataLoader(DATA, 6, sampler=SubsetRandomSampler([3, 3, 3])), "row 3 3 times.*Subset"),
        (DataLoader(DATA, 6, sampler=iter(range(20))), r"\(an epoch of range_iterator .* once\)\. Pass num_data=N"),
        (DataLoader(TensorDataset(X.view(5, 4, 2)), batch_size=None), "batch_size=None: an item of the dataset"),
        (DataLoader(Stream(None), 6), "iterable, without a length"),
        (DataLoader(Stream(20), batch_size=None), "Pass num_data=N"),
        ((X for _ in range(3)), "Pass num_data=N"),
    ],
)
def test_what_does_not_show_its_rows_is_refused(loader, words):
    with pytest.raises(ValueError, match=words):
        epoch_of(loader, None)


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        (Drawn(ONE_MORE_OFTEN), r"Drawn draws rows unequally often: .* were row 7 and"),
        (Drawn(BALANCED), "poutine.scale"),
        (Shuffled(repeats=2), "Shuffled draws .* were row 0 and"),
    ],
)
@pytest.mark.parametrize("num_data", [None, 15, 20])
def test_samplers_that_weight_rows_are_refused_whatever_n_is_stated(sampler, words, num_data):
    with pytest.raises(ValueError, match=words):
        epoch_of(DataLoader(DATA, 6, sampler=sampler), num_data)


@pytest.mark.parametrize("weights", [ONE_MORE_OFTEN, BALANCED])
def test_batch_samplers_that_weight_rows_are_refused(weights):
    with pytest.raises(ValueError, match="Drawn draws rows unequally often"):
        epoch_of(DataLoader(DATA, batch_sampler=Drawn(weights, 5)), 20)


def test_another_part_in_each_epoch_is_a_part_of_all_rows():
    epoch = epoch_of(DataLoader(DATA, batch_sampler=grouped(7, 3)), None)
    assert (epoch.num_data, epoch.num_batches, epoch.num_rows) == (20, None, 10)


def test_a_part_for_a_process_is_not_the_whole():
    loader = DataLoader(DATA, 6, sampler=DistributedSampler(DATA, 2, 0))
    with pytest.raises(ValueError, match="num_data=20, but the epochs of the DataLoader draw from 10 rows"):
        epoch_of(loader, 20)


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_batch_larger_than_the_data_leaves_no_batch(shuffle):
    with pytest.raises(ValueError, match=r"batch_size=64 and drop_last=True, and its epochs draw 20 rows"):
        epoch_of(DataLoader(DATA, 64, shuffle=shuffle, drop_last=True), None)


@pytest.mark.parametrize("loader", [[], DataLoader([], 2), DataLoader(TensorDataset(X[:0]), 2)])
def test_loaders_without_rows_are_refused(loader):
    with pytest.raises(ValueError, match="holds no rows"):
        epoch_of(loader, None)


def test_stated_numbers_count_where_a_loader_shows_none():
    once = DataLoader(DATA, 6, sampler=iter(range(20)))
    pairs = DataLoader(DATA, 6, sampler=Pairs())
    for loader in (once, pairs, DataLoader(Stream(None), 6), (X for _ in range(3))):
        epoch = epoch_of(loader, 15)
        assert (epoch.num_data, epoch.num_batches, epoch.num_rows, epoch.is_shown) == (15, None, None, False)
    joined = DataLoader(TensorDataset(X.view(5, 4, 2)), 2, collate_fn=lambda items: torch.cat([x for (x,) in items]))
    assert epoch_of(joined, 20).num_data == 20
    subset = DataLoader(Subset(DATA, [1, 1, 2]), 2, shuffle=True)
    assert epoch_of(subset, None).num_data == 3


def drawn(loader, num_data=None, batches=5, prefetch=0):
    source = LoaderBatches(loader, {}, num_data)
    source.prefetch = prefetch
    source.start(torch.Generator().manual_seed(0))
    try:
        return [len(source.draw()[0]) for _ in range(batches)]
    finally:
        source.close()


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Stream(30), 5),
        DataLoader(Stream(30), 5, drop_last=True),
        DataLoader(Stream(15), 6, drop_last=True),
        DataLoader(DATA, 10, collate_fn=lambda items: torch.stack([x for (x,) in items if x[0] > 10])),
        DataLoader(TensorDataset(X.view(5, 4, 2)), 2, collate_fn=lambda items: torch.cat([x for (x,) in items])),
    ],
    ids=["more", "more, without the last", "fewer", "left out", "joined"],
)
@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
def test_an_epoch_that_holds_other_rows_than_it_says_is_refused(loader, prefetch):
    with pytest.raises(DataError, match=r"rows, where .* num_data=N"):
        drawn(loader, batches=6, prefetch=prefetch)


def test_epochs_that_hold_what_they_say_go_on():
    assert drawn(DataLoader(Stream(20), 6, drop_last=True), batches=8) == [6] * 8
    assert drawn(DataLoader(Stream(20), 6), batches=9) == [6, 6, 6, 2] * 2 + [6]
    assert drawn(DataLoader(Stream(30), 5), num_data=20, batches=9) == [5] * 9
    assert drawn([X[:12], X[12:]], batches=5) == [12, 8, 12, 8, 12]


def test_an_epoch_that_was_resumed_is_counted():
    loader = DataLoader(DATA, 5, collate_fn=lambda items: torch.stack([x for (x,) in items if x[0] % 4 > 0]))
    source = LoaderBatches(loader, {}, None)
    source.start(torch.Generator().manual_seed(0))
    for _ in range(2):
        source.draw()
    source.load_state_dict(source.state_dict())
    for _ in range(2):
        source.draw()
    with pytest.raises(DataError, match="held 10 rows, where 20"):
        source.draw()


def joined_items(sizes, **settings):
    """A loader whose items are several rows, ``sizes`` of them."""
    return DataLoader(X.split(list(sizes)), collate_fn=torch.cat, **settings)


def test_items_of_several_rows():
    """A batch counts by its items, not by its rows."""
    loader = joined_items([1, 12, 3, 4], batch_size=2)
    source = LoaderBatches(loader, {}, 20)
    source.start(torch.Generator().manual_seed(0))
    batches = [source.draw() for _ in range(4)]
    assert [source.scale(batch) for batch in batches] == [2.0] * 4
    with pytest.raises(DataError, match="held 20 rows, where 30"):
        drawn(loader, num_data=30)
    independent = DataLoader(
        DATA, 5, sampler=RandomSampler(DATA, replacement=True), collate_fn=lambda i: torch.stack([x for (x,) in i])
    )
    with pytest.raises(DataError, match="held 20 rows, where 30"):
        drawn(independent, num_data=30)


class Batches:
    """An iterable of batches of these sizes, without a length unless it is given."""

    def __init__(self, *sizes):
        self.sizes = sizes

    def __iter__(self):
        return iter(X.split(list(self.sizes)))


class SizedBatches(Batches):
    def __len__(self):
        return len(self.sizes)


@pytest.mark.parametrize("kind", [Batches, SizedBatches, lambda *sizes: iter(2 * X.split(list(sizes)))])
@pytest.mark.parametrize("sizes", [(1, 19), (19, 1), (8, 2, 8, 2), (5, 5, 4, 6), (6, 4, 6, 4)])
def test_batches_of_unequal_sizes_are_exact_or_refused(kind, sizes):
    source = LoaderBatches(kind(*sizes), {}, 20)
    source.start(torch.Generator().manual_seed(0))
    try:
        for _ in sizes:
            source.draw()
        batches = [source.draw() for _ in sizes]
    except DataError as error:
        assert "differ in size" in str(error)  # noqa: PT017 - the other outcome is asserted below
        return
    estimate = sum(source.scale(batch) * batch[0].sum(0) for batch in batches) / len(sizes)
    torch.testing.assert_close(estimate, X.sum(0))


@pytest.mark.parametrize("sizes", [(6, 6, 6, 2), (19, 1)])
def test_a_shorter_last_batch_counts_as_its_rows_do(sizes):
    """Its rows weigh as much as others at once, and after an epoch the mean is exact; also where a run goes on."""
    source = LoaderBatches(Batches(*sizes), {}, 20)
    source.start(torch.Generator().manual_seed(0))
    assert {source.scale(source.draw()) for _ in sizes} == {20 / sizes[0]}
    assert source.scale(source.draw()) == len(sizes)
    resumed = LoaderBatches(Batches(*sizes), {}, 20)
    resumed.start(torch.Generator().manual_seed(0))
    resumed.load_state_dict(source.state_dict())
    assert resumed.scale(resumed.draw()) == len(sizes)
    assert sum(weight for _, weight in LoaderBatches(Batches(*sizes), {}, 20).cover()) == pytest.approx(1.0)


def test_a_sized_iterable_is_not_taken_to_cover_what_it_does_not():
    """Four batches of ten would be 40 rows, as stated; the last one has eight."""

    class Batches:
        def __len__(self):
            return 4

        def __iter__(self):
            return iter([torch.ones(10, 1)] * 3 + [torch.ones(8, 1)])

    with pytest.raises(DataError, match="held 38 rows, where 40"):
        drawn(Batches(), num_data=40)


def test_batches_that_are_part_of_the_data_are_scaled_by_their_rows():
    class Batches:
        def __len__(self):
            return 3

        def __iter__(self):
            return iter([torch.ones(10, 1)] * 3)

    source = LoaderBatches(Batches(), {}, 100)
    source.start(torch.Generator().manual_seed(0))
    assert {source.scale(source.draw()) for _ in range(5)} == {10.0}


def test_chains_with_batches_of_unequal_shapes_are_refused():
    source = LoaderBatches(DataLoader(DATA, batch_sampler=grouped(3, 7, 9, 1)), {}, None)
    source.start([torch.Generator().manual_seed(i) for i in range(2)])
    source._by_chain[0].draw()
    with pytest.raises(DataError, match=r"one shape.*sequential"):
        source.draw()
