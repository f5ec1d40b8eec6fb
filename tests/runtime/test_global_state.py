# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pytest
import torch

from pyro_apd.runtime.global_state import gradients, preserved_param_store, seeded


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


def test_gradients_are_computed_in_any_context_but_one():
    def state():
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    @gradients("f")
    def slope(x):
        x = x.clone().requires_grad_()
        assert state() == (True, False)
        (torch.mm(x, x)).sum().backward()
        return x.grad

    x = torch.randn(3, 3)
    expected = slope(x)
    for context in (torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            before = state()
            found = slope(x)
            assert state() == before
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"^f computes gradients.*inference_mode.*no_grad"):
        slope(x)


def test_the_context_is_restored_after_an_error():
    with torch.no_grad(), torch.autocast("cpu"):
        with pytest.raises(KeyError), gradients("f"):
            raise KeyError
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
