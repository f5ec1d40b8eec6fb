# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Options are checked once, and are Python's own numbers afterwards."""

import numpy as np
import pytest

from pyro_apd.distillation.options import DistillOptions, RunLengths


def test_numbers_of_numpy_become_pythons():
    options = DistillOptions(num_steps=np.int64(7), rank=np.int32(3), seed=np.uint64(2**63))
    assert (options.num_steps, options.rank, options.seed) == (7, 3, 2**63)
    assert all(type(value) is int for value in (options.num_steps, options.rank, options.seed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": True}, "num_steps=True must be an integer >= 0. None takes the default"),
        ({"rank": 0}, "rank=0 must be a positive integer. None takes the default"),
        ({"seed": -1}, "seed=-1 must be None or an integer"),
        ({"generator": 3}, "generator=3 must be one of 'paper', 'subspace'"),
        ({"generator": "coordinates"}, "generator='coordinates' is replaced by 'subspace', the default"),
        ({"generator": "chunked"}, "Files of the old kinds can still be read"),
        ({"byte_budget": 0}, r"byte_budget=0 must be a positive integer\. Give networks as a float"),
        ({"byte_budget": 0.0}, r"byte_budget=0\.0 must be a positive finite number"),
        ({"byte_budget": "1"}, "byte_budget='1'"),
        ({"generator": "paper", "byte_budget": 1.0}, "byte_budget=1.0 has no meaning for generator='paper'"),
        ({"objective": "wgan"}, "objective='wgan' with generator='subspace': accepted are"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DistillOptions(**options)


def test_a_budget_is_networks_or_bytes():
    assert DistillOptions(byte_budget=1.5).byte_budget == 1.5
    whole = DistillOptions(byte_budget=np.int64(1000)).byte_budget
    assert type(whole) is int


def test_a_round_takes_a_share_of_the_steps():
    assert DistillOptions().steps(500) == 500
    assert DistillOptions(num_steps=40, share_of_steps=4).steps(500) == 10


def test_lengths_of_a_run_have_defaults():
    lengths = RunLengths.checked(np.int64(40), None, 2, 60, 3, None)
    assert lengths == RunLengths(40, 20, 2, 60, 3, 3)
    assert all(type(value) is int for value in vars(lengths).values())
    assert (lengths.capacity, lengths.schedule) == (30, [10, 20])
    assert RunLengths.checked(10, 0, 1, 20, 9, 5).schedule == [1, 2, 5]
