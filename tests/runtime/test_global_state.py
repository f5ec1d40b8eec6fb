# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pytest
import torch

from pyro_apd.runtime.global_state import preserved_param_store, seeded


def test_new_parameters_go_and_old_ones_stay():
    old = pyro.param("old", torch.ones(2))
    with pytest.raises(ZeroDivisionError), preserved_param_store():
        pyro.param("new", torch.ones(1) * (1 / len(pyro.param("also_new", torch.zeros(0)))))
    store = pyro.get_param_store()
    assert list(store.keys()) == ["old"]
    assert store["old"] is old
    pyro.clear_param_store()


def test_seeded_repeats_and_restores():
    before = torch.get_rng_state()
    with seeded(3):
        first = torch.rand(2)
    with pytest.raises(IndexError), seeded(3):
        assert torch.equal(first, torch.rand(2)) and [][0]  # noqa: PT018
    assert torch.equal(torch.get_rng_state(), before)


def test_no_seed_leaves_everything_as_it_is():
    before = torch.get_rng_state()
    with seeded(None):
        torch.rand(2)
    assert not torch.equal(torch.get_rng_state(), before)
