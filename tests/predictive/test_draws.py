# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""So many draws of whatever stands for a posterior."""

import pytest
import torch

from pyro_apd.generators import PaperGenerator
from pyro_apd.models.layout import Layout
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.predictive.draws import take_draws


def test_a_choice_of_stored_draws_keeps_sites_together():
    draws = {"a": torch.arange(30.0), "b": -torch.arange(30.0)}
    chosen = take_draws(draws, 10, seed=1)
    assert (chosen["a"].diff() > 0).all(), "in their order, each once"
    assert len(chosen["a"]) == 10
    assert torch.equal(chosen["a"], -chosen["b"])
    assert torch.equal(chosen["a"], take_draws(draws, 10, seed=1)["a"])
    assert not torch.equal(chosen["a"], take_draws(draws, 10, seed=2)["a"])
    assert torch.equal(take_draws(draws, 31)["a"], draws["a"])


def test_fresh_draws_of_a_generator_leave_the_global_generator_alone():
    layout = Layout({"a": (3,)})
    posterior = DistilledPosterior(layout, PaperGenerator(3, 2, 4))
    before = torch.get_rng_state()
    first = take_draws(posterior, 5, seed=1)["a"]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, take_draws(posterior, 5, seed=1)["a"])
    assert not torch.equal(take_draws(posterior, 5)["a"], take_draws(posterior, 5)["a"])


def test_what_is_no_posterior():
    with pytest.raises(ValueError, match="holds no sites"):
        take_draws({}, 3)
    with pytest.raises(ValueError, match=r"must be draws .* got list"):
        take_draws([1.0], 3)
