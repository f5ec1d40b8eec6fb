# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_apd.diagnostics.comparison import memorisation
from pyro_apd.diagnostics.comparison.memorisation import new_draw_shares
from pyro_apd.predictive.draws import read_chains
from tests.support.small_posteriors import autoregressive

STEPS = list(range(0, 60, 3))


@pytest.fixture
def chain():
    g = torch.Generator().manual_seed(0)
    return read_chains(
        {"a": torch.randn(3, 60, 4, 2, generator=g), "b": 5 + torch.randn(3, 60, generator=g)}, group_by_chain=True
    )


def theta(chain):
    return torch.cat([chain.values["a"].flatten(0, 1).flatten(1), chain.values["b"].flatten().unsqueeze(1)], 1)


def test_copies_fresh_draws_and_twins(chain):
    own = theta(chain)
    g = torch.Generator().manual_seed(1)
    fresh = torch.randn(40, 9, generator=g) + torch.tensor([0.0] * 8 + [5.0])
    found = new_draw_shares(
        chain,
        STEPS,
        {
            "copies": own[:40],
            "with noise": own[:40] + 0.02 * torch.randn(40, 9, generator=g),
            "half": torch.cat([own[:20], fresh[:20]]),
            "fresh": fresh,
            "twins": fresh[:20].repeat(2, 1),
            "one": fresh[:1],
        },
    )
    assert found == {
        **{"chain": 1.0, "copies": 0.0, "with noise": 0.0, "half": 0.5, "fresh": 1.0, "twins": 0.0, "one": 1.0}
    }


def test_blocks_make_no_difference(chain, monkeypatch):
    sets = {"half": torch.cat([theta(chain)[70:75], torch.zeros(5, 9)])}
    whole = new_draw_shares(chain, STEPS, sets)
    monkeypatch.setattr(memorisation, "_BLOCK_BYTES", 7 * chain.bytes_per_draw)
    assert new_draw_shares(chain, STEPS, sets) == whole


def test_a_generator_that_follows_a_slow_chain_is_no_copy():
    g = torch.Generator().manual_seed(0)
    slow = autoregressive(2, 300, (9,), 0.98, g)
    chain = read_chains({"a": slow}, group_by_chain=True)
    near = slow.flatten(0, 1)[::6] + 0.2 * torch.randn(100, 9, generator=g)
    assert new_draw_shares(chain, list(range(0, 300, 6)), {"near": near})["near"] > 0.9


def test_weights_that_do_not_move_do_not_count(chain):
    still = read_chains({**chain.values, "c": torch.full((3, 60, 2), 3.0)}, group_by_chain=True)
    own = torch.cat([theta(chain)[:9], torch.full((9, 2), 3.0)], 1)
    assert new_draw_shares(still, STEPS, {"copies": own})["copies"] == 0.0


def test_nothing_to_measure_by():
    held = read_chains({"a": torch.randn(1, 10, 3).repeat_interleave(6, 1)}, group_by_chain=True)
    assert new_draw_shares(held, STEPS, {"x": torch.randn(5, 3)}) == {}
    assert (
        new_draw_shares(read_chains({"a": torch.ones(2, 60, 3)}, group_by_chain=True), STEPS, {"x": torch.ones(5, 3)})
        == {}
    )
