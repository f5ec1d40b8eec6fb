# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from torch.distributions import constraints, transforms

from pyro_apd.chains.stores.base import STATISTICS, MemoryStore, as_bytes, kept_columns, kept_layout
from pyro_apd.chains.stores.disk import DiskStore
from pyro_apd.models.layout import Layout

LAYOUT = Layout(
    {"w": (2, 3), "scale": (), "mix": (3,), "b": (2,)}, {"scale": constraints.positive, "mix": constraints.simplex}
)


@pytest.fixture(params=["memory", "disk"])
def make(request, tmp_path):
    """Makes a store of either kind; both must behave alike."""

    def make(layout=LAYOUT, num_chains=2, num_draws=5, dtype=torch.float32):
        if request.param == "memory":
            return MemoryStore(layout, num_chains, num_draws, torch.empty(0, dtype=dtype))
        return DiskStore.create(tmp_path / "store", layout, num_chains, num_draws, dtype)

    return make


def draw_of(chain, draw, layout=LAYOUT, dtype=torch.float32):
    return (torch.arange(layout.size) * 0.1 + chain - 0.01 * draw).to(dtype)


def fill(store, num_draws=5, chains=(0, 1), dtype=torch.float32):
    for draw in range(num_draws):
        for chain in chains:
            figures = {"potential": torch.tensor(10.0 * chain + draw), "grad_norm": torch.tensor(2.0), "step_size": 0.5}
            store.write(chain, draw, draw_of(chain, draw, store.layout, dtype).unsqueeze(0), figures)
    return store


def expected_theta(num_draws=5, chains=(0, 1), dtype=torch.float32):
    return torch.stack([torch.stack([draw_of(c, s, dtype=dtype) for s in range(num_draws)]) for c in chains])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_what_was_written_is_read(make, dtype):
    store = fill(make(dtype=dtype), dtype=dtype)
    assert store.counts == [5, 5]
    assert store.theta_CSD.dtype == dtype
    assert torch.equal(store.unconstrained(), expected_theta(dtype=dtype))
    assert set(store.statistics) == set(STATISTICS)
    torch.testing.assert_close(store.statistics["potential"][1], torch.arange(10.0, 15.0), check_dtype=False)
    torch.testing.assert_close(store.statistics["step_size"], torch.full((2, 5), 0.5), check_dtype=False)


def test_vectorised_chains_are_written_at_once(make):
    store = make()
    theta_CD = torch.stack([draw_of(0, 0), draw_of(1, 0)])
    store.write(0, 0, theta_CD, {"potential": torch.tensor([1.0, 2.0]), "grad_norm": torch.ones(2), "step_size": 0.1})
    assert store.counts == [1, 1]
    assert torch.equal(store.theta_CSD[:, 0], theta_CD)
    assert store.statistics["potential"][:, 0].tolist() == [1.0, 2.0]


def test_writing_copies(make):
    store, theta_CD = make(num_chains=1), torch.zeros(1, LAYOUT.size)
    store.write(0, 0, theta_CD, dict.fromkeys(STATISTICS, 0.0))
    theta_CD += 1
    assert store.theta_CSD[0, 0].abs().max() == 0


def test_samples_are_by_sorted_site_and_constrained(make):
    store = fill(make())
    samples = store.samples()
    assert list(samples) == sorted(LAYOUT.names)
    expected = LAYOUT.constrain(expected_theta())
    for name, value in samples.items():
        assert value.shape == (2, 5, *LAYOUT[name].shape)
        torch.testing.assert_close(value, expected[name])


def test_constraining_goes_block_by_block(make, monkeypatch):
    monkeypatch.setattr("pyro_apd.chains.stores.base._BLOCK_BYTES", 2 * 4 * LAYOUT.size)
    store = fill(make())
    assert store.blocks() == [(0, 2), (2, 4), (4, 5)]
    torch.testing.assert_close(store.samples()["mix"], LAYOUT.constrain(expected_theta())["mix"])


def test_real_sites_are_views(make):
    store = fill(make())
    theta, samples = store.theta_CSD, store.samples()
    for name in ("w", "b"):
        assert samples[name].untyped_storage().data_ptr() == theta.untyped_storage().data_ptr()
        assert samples[name].reshape(-1, *LAYOUT[name].shape).data_ptr() == samples[name].data_ptr()


def test_given_transforms_take_the_place_of_the_layouts(make):
    store = fill(make())
    samples = store.samples({"w": transforms.AffineTransform(0.0, 2.0)})
    theta = LAYOUT.split(expected_theta())
    torch.testing.assert_close(samples["w"], theta["w"] / 2)
    torch.testing.assert_close(samples["scale"], theta["scale"])


@pytest.mark.parametrize(
    ("counts", "chains", "num_draws"),
    [
        ((5, 5), [0, 1], 5),
        ((3, 3), [0, 1], 3),
        ((5, 1), [0], 5),
        ((1, 5), [1], 5),
        ((5, 3), [0, 1], 3),
        ((2, 4), [0, 1], 2),
        ((0, 0), [0, 1], 0),
        ((0, 2), [1], 2),
    ],
)
def test_the_largest_block_that_can_be_grouped(make, counts, chains, num_draws):
    store = make()
    for chain, count in enumerate(counts):
        fill(store, count, chains=(chain,))
    assert store.counts == list(counts)
    assert store.complete_part() == (chains, num_draws)
    samples = store.samples()
    assert samples["mix"].shape == (len(chains), num_draws, 3)
    if num_draws:
        torch.testing.assert_close(samples["mix"], LAYOUT.constrain(expected_theta(num_draws, chains))["mix"])


def test_chains_that_do_not_lie_in_a_row(make):
    store = make(num_chains=3)
    fill(store, chains=(0, 2))
    assert store.complete_part() == ([0, 2], 5)
    torch.testing.assert_close(store.samples()["scale"], LAYOUT.constrain(expected_theta(chains=(0, 2)))["scale"])


def test_a_chain_that_ended_gets_no_more_draws(make):
    store = fill(make(num_chains=3), 4, chains=(0, 1, 2))
    store.end(1, 2)
    theta_CD = torch.stack([draw_of(chain, 4) for chain in range(3)])
    store.write(0, 4, theta_CD, {"potential": 0.0, "grad_norm": 0.0, "step_size": 0.5})
    assert store.counts == [5, 2, 5]
    assert store.missing_chains == [1]
    assert store.samples()["w"].shape[:2] == (2, 5)
    store.end(0, 0)
    assert (store.counts, store.missing_chains) == ([0, 2, 5], [0, 1])


def test_draws_can_be_taken_back(make):
    store = fill(make())
    store.truncate(1, 2)
    store.truncate(0, 9)
    assert store.counts == [5, 2]


def test_get_samples_as_pyros(make):
    store = fill(make())
    assert store.get_samples()["w"].shape == (10, 2, 3)
    assert store.get_samples(group_by_chain=True)["w"].shape == (2, 5, 2, 3)
    assert store.get_samples(3)["w"].shape == (3, 2, 3)


def test_no_sites(make):
    store = make(Layout({}))
    assert store.samples() == {}
    assert store.complete_part() == ([0, 1], 0)


def test_kept_layout_and_columns():
    kept = kept_layout(LAYOUT, ["b", "scale"])
    assert kept.names == ("scale", "b")
    assert kept["scale"].support is constraints.positive
    theta_CD = torch.arange(2.0 * LAYOUT.size).reshape(2, -1)
    columns = kept_columns(LAYOUT, kept, theta_CD)
    assert torch.equal(kept.split(columns)["b"], LAYOUT.split(theta_CD)["b"])
    assert torch.equal(kept.split(columns)["scale"], LAYOUT.split(theta_CD)["scale"])
    assert kept_columns(LAYOUT, kept_layout(LAYOUT, None), theta_CD) is theta_CD


def test_save_params_that_are_no_sites():
    with pytest.raises(ValueError, match=r"save_params has \['nope'\].*'mix'"):
        kept_layout(LAYOUT, ["w", "nope"])


def test_a_store_moves_into_memory(make):
    store = fill(make(), 4)
    for copy in (MemoryStore.of(store, "cpu"), MemoryStore.adopting(store)):
        assert copy.counts == [4, 4]
        assert torch.equal(copy.unconstrained(), store.unconstrained())
        assert torch.equal(copy.statistics["potential"][:, :4], store.statistics["potential"][:, :4])
        assert copy.samples()["w"].shape == (2, 4, 2, 3)


def test_memory_comes_with_the_draws():
    """A buffer that was filled at the start would take all of its memory at once."""
    before = resident()
    store = MemoryStore(Layout({"w": (100_000,)}), 1, 1_000, torch.empty(0))
    assert resident() - before < 10e6
    store.write(0, 0, torch.zeros(1, 100_000), dict.fromkeys(STATISTICS, 0.0))


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("values", [torch.tensor(1.5), torch.arange(4)[::2], torch.ones(2, 3, dtype=torch.bfloat16)])
def test_as_bytes(values):
    assert bytes(as_bytes(values)) == bytes(values.contiguous().reshape(-1).view(torch.uint8).tolist())
