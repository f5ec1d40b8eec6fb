# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import pytest
import torch

from pyro_apd.kernels.engine.chain_set import ChainSet
from pyro_apd.runtime.ranks import Ranks


def test_a_single_chain():
    chains = ChainSet(3)
    assert (chains.size, chains.numbers, chains.num_counted) == (1, range(3, 4), 1)
    assert (chains.count, chains.store_row(3), chains.data_rank) == (None, 3, 0)
    assert chains.is_whole_run
    assert not chains.is_distributed


def test_all_chains_of_a_run():
    chains = ChainSet(count=4)
    assert (chains.size, chains.numbers, chains.num_counted) == (4, range(4), 4)
    assert [chains.store_row(number) for number in chains.numbers] == [0, 1, 2, 3]
    assert chains.is_whole_run


@pytest.mark.parametrize(("first_row", "rows"), [(0, [0, 1]), (2, [2, 3]), (None, [2, 3])])
def test_part_of_a_run(first_row, rows):
    chains = ChainSet(2, 2, total=5, first_row=first_row, peer_ranks=Ranks(1, 2))
    assert (chains.size, chains.num_counted) == (2, 5)
    assert [chains.store_row(number) for number in chains.numbers] == rows
    assert chains.is_distributed
    assert not chains.is_whole_run
    assert ChainSet(0, 5, total=5).is_whole_run


def test_seeds_depend_on_the_run_and_the_number_alone():
    together = ChainSet(count=4).seeds(7)
    assert len(set(together)) == 4
    assert ChainSet(2, 2, total=4, first_row=0).seeds(7) == together[2:]
    assert ChainSet(3).seeds(7) == together[3:]
    assert not set(ChainSet(count=4).seeds(8)) & set(together)


def test_selection_of_starts():
    params = {"w": torch.arange(8.0).reshape(4, 2), "b": torch.arange(4.0)}
    one = ChainSet(2).select(params)
    assert one["w"].tolist() == [4.0, 5.0]
    assert one["b"].shape == ()
    two = ChainSet(1, 2).select(params)
    assert two["w"].tolist() == [[2.0, 3.0], [4.0, 5.0]]
    assert two["b"].tolist() == [1.0, 2.0]


def test_values_shared_with_the_processes_that_have_the_data():
    assert ChainSet().same_on_data_ranks(0.5) == 0.5
    assert ChainSet(data_ranks=Ranks()).same_on_data_ranks(0.5) == 0.5
    assert ChainSet(data_ranks=Ranks(2, 3)).data_rank == 2


def test_it_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ChainSet().first = 2
