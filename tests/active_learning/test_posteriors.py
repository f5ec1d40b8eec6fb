# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Ready-made posteriors of the loop."""

import pytest
import torch
from torch.testing import assert_close

from pyro_apd import DistilledPosterior
from pyro_apd.active_learning import Baseline, Chain, Distilled
from tests.support.models import Classifier

pytestmark = pytest.mark.slow

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3


def test_a_chain_gives_all_draws_and_a_seed_determines_them():
    chain = Chain(0.01, num_samples=5, warmup_steps=5, num_chains=2, batch_size=4)
    draws = chain(Classifier(), X, Y, 1, None)
    assert draws["first.weight"].shape == (10, 6, 4)
    assert torch.equal(draws["first.weight"], chain(Classifier(), X, Y, 1, None)["first.weight"])
    assert not torch.equal(draws["first.weight"], chain(Classifier(), X, Y, 2, None)["first.weight"])


def test_settings_may_follow_the_number_of_labels():
    chain = Chain(lambda n: 0.1 / n, temperature=lambda n: 1 / (10 * n), batch_size=20)
    kernel = chain.make_kernel(Classifier(), 10, seed=0)
    assert kernel.schedule(0) == pytest.approx(0.01)
    assert kernel.temperature == pytest.approx(0.01)
    assert kernel.batch_size is None
    assert chain.make_kernel(Classifier(), 30, seed=0).batch_size == 20


@pytest.mark.parametrize("num_chains", [1, 2])
def test_a_warm_chain_starts_where_the_last_ended(num_chains):
    still = Chain(1e-12, num_samples=1, warmup_steps=0, thinning=1, num_chains=num_chains, temperature=0.0)
    previous = Chain(0.01, num_samples=4, warmup_steps=4, num_chains=num_chains)(Classifier(), X, Y, 0, None)
    draws = still(Classifier(), X, Y, 1, previous)
    for name, value in previous.items():
        assert_close(draws[name], value.unflatten(0, (num_chains, 4))[:, -1])


def test_a_warm_chain_starts_also_where_a_chain_diverged_before():
    """Its draws are missing then, and the number of draws need not be a multiple of the number of chains."""
    still = Chain(1e-12, num_samples=1, warmup_steps=0, thinning=1, num_chains=3, temperature=0.0)
    previous = {name: value[:8] for name, value in Chain(0.01, 4, 4, num_chains=2)(Classifier(), X, Y, 0).items()}
    draws = still(Classifier(), X, Y, 1, previous)
    for name, value in previous.items():
        assert_close(draws[name], value[[1, 4, 7]])


@pytest.mark.filterwarnings("ignore::pyro_apd.DistillationWarning")
def test_a_distilled_posterior_and_a_chain_from_its_draws():
    chain = Chain(0.01, num_samples=30, warmup_steps=5)
    distilled = Distilled(chain, num_steps=2, options={"rank": 2})
    posterior = distilled(Classifier(), X, Y, 3, None)
    assert isinstance(posterior, DistilledPosterior)
    assert posterior.metadata["num_steps"] == 2
    assert posterior.metadata["num_draws"] == 30
    still = Chain(1e-12, num_samples=1, warmup_steps=0, thinning=1, temperature=0.0)
    draws = still(Classifier(), X, Y, 4, posterior)
    assert_close(draws["first.weight"], posterior.get_samples(1, seed=4)["first.weight"])


@pytest.mark.filterwarnings("ignore::pyro_apd.DistillationWarning")
def test_online_distillation_cold_and_warm():
    chain = Chain(0.01, num_samples=15, warmup_steps=2, num_chains=2)
    online = Distilled(chain, num_steps=2, online=True, options={"rank": 2, "rounds": 1})
    posterior = online(Classifier(), X, Y, 3, None)
    assert isinstance(posterior, DistilledPosterior)
    assert posterior.layout["first.weight"].shape == (6, 4)
    still = Chain(1e-12, num_samples=15, warmup_steps=0, num_chains=2, temperature=0.0)
    repeated = Distilled(still, num_steps=0, online=True, options={"rank": 1, "rounds": 1})(
        Classifier(), X, Y, 4, posterior
    )
    # Chains that do not move stay at the two draws that they started from.
    start = posterior.get_samples(2, seed=4)["first.weight"]
    assert_close(repeated.get_samples(4000, seed=0)["first.weight"].mean(0), start.mean(0), atol=0.05, rtol=0.1)


def test_a_baseline_starts_cold_or_at_the_weights_before():
    seen = {}

    def fit(model, x, y, **options):
        seen.update(options, rows=len(x))
        return {"w": torch.ones(1, 2)}

    baseline = Baseline(fit, {"num_steps": 4})
    baseline(Classifier(), X, Y, 5, None)
    assert seen == {"num_steps": 4, "seed": 5, "progress": False, "rows": 12}
    baseline(Classifier(), X, Y, 5, {"w": torch.arange(4.0).reshape(2, 2)})
    assert seen["init_strategy"]({"name": "w", "fn": None}).tolist() == [0.0, 1.0]
