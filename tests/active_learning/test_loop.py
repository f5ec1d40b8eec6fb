# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The loop: what is asked, in which order, and that it goes on where it stopped."""

import json

import pytest
import torch
from torch import nn

from pyro_apd import BNN, active_learning
from pyro_apd.active_learning import History, balanced
from pyro_apd.errors import ModelError
from tests.support.models import Classifier

pytestmark = pytest.mark.slow

NUM_CLASSES = 3


def data(count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % NUM_CLASSES
    centre = 2 * torch.eye(4)[:NUM_CLASSES]
    return centre[y] + 0.5 * torch.randn(count, 4, generator=generator), y


def nearest_mean(model, x, y, seed, previous):
    """A posterior in no time: linear classifiers towards the means of the classes, blurred."""
    generator = torch.Generator().manual_seed(seed)
    weight_KD = torch.stack([x[y == k].sum(0) / max(1, int((y == k).sum())) for k in range(NUM_CLASSES)])
    bias_K = -0.5 * weight_KD.square().sum(1)
    start = 0.0 if previous is None else previous["net.weight"].mean()
    return {
        "net.weight": start * 0.01 + weight_KD + 0.3 * torch.randn(12, NUM_CLASSES, 4, generator=generator),
        "net.bias": bias_K + 0.3 * torch.randn(12, NUM_CLASSES, generator=generator),
    }


def run(acquisition="bald", **changes):
    x, y = changes.pop("pool", data())
    x_test, y_test = data(30, seed=1)
    model = changes.pop("model", None) or BNN(nn.Linear(4, NUM_CLASSES))
    settings = {
        "posterior": nearest_mean, "initial": 3, "batch_size": 2, "num_rounds": 4, "num_score_draws": 8,
        "num_test_draws": 8, "progress": False,
    } | changes  # fmt: skip
    return active_learning.run(model, x, y, x_test, y_test, acquisition=acquisition, **settings)


@pytest.mark.parametrize("acquisition", active_learning.ACQUISITIONS)
def test_each_round_has_the_labels_that_the_last_one_wanted(acquisition):
    history = run(acquisition)
    assert history.num_labels == [3, 5, 7, 9]
    assert len(history.labelled) == len(set(history.labelled)) == 9
    assert history.labelled == [*history.initial, *(i for one in history.rounds[:3] for i in one.wanted)]
    assert not set(history.wanted) & set(history.labelled)
    assert all(0 <= accuracy <= 1 for accuracy in history.accuracy)
    assert history.accuracy[-1] > 0.8
    assert history.mean_accuracy == pytest.approx(sum(history.accuracy) / 4)
    assert history.labels_to_reach(0.0) == 3
    assert history.labels_to_reach(1.1) is None


def test_only_labels_that_were_asked_for_are_looked_at():
    x, y = data()
    history = run(pool=(x, y), initial=[0, 1, 2])
    hidden = torch.ones(len(y), dtype=torch.bool)
    hidden[torch.tensor(history.labelled)] = False
    altered = torch.where(hidden, (y + 1) % NUM_CLASSES, y)
    other = run(pool=(x, altered), initial=[0, 1, 2])
    assert [one.outcome() for one in other.rounds] == [one.outcome() for one in history.rounds]


def test_a_seed_determines_the_run_and_leaves_global_state_alone():
    model = BNN(nn.Linear(4, NUM_CLASSES))
    before = torch.get_rng_state()
    first, again, other = run(model=model), run(model=model), run(model=model, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert first.outcome() == again.outcome()
    assert first.labelled != other.labelled
    alike = {"initial": [0, 1, 2]}  # so that only what comes after can differ
    for acquisition in ("random", "bald"):
        assert run(acquisition, **alike).labelled != run(acquisition, seed=1, **alike).labelled


def test_warm_rounds_start_from_the_last_and_cold_ones_do_not():
    seen = []

    def watching(model, x, y, seed, previous):
        seen.append(previous)
        return nearest_mean(model, x, y, seed, previous)

    run(posterior=watching)
    assert seen == [None] * 4
    seen.clear()
    run(posterior=watching, retraining="warm")
    assert seen[0] is None
    assert all(previous is not None for previous in seen[1:])
    assert len(seen) == 4


@pytest.mark.parametrize("retraining", ["cold", "warm"])
def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path, retraining):
    calls = []

    def breaking(model, x, y, seed, previous):
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return nearest_mean(model, x, y, seed, previous)

    breaking.__qualname__ = nearest_mean.__qualname__
    path = tmp_path / "histories" / "run.json"
    whole = run("batch_bald", retraining=retraining)
    with pytest.raises(KeyboardInterrupt):
        run("batch_bald", retraining=retraining, posterior=breaking, history_path=path)
    assert len(json.loads(path.read_text())["rounds"]) == 2
    resumed = run("batch_bald", retraining=retraining, posterior=breaking, history_path=path)
    assert calls == [3, 5, 7, 7, 9]
    assert resumed.outcome() == whole.outcome()
    states = list(path.parent.glob("*.safetensors"))
    assert len(states) == (1 if retraining == "warm" else 0)
    assert not list(path.parent.glob("*.part"))


def test_a_finished_run_is_read_and_can_be_made_longer_or_shorter(tmp_path):
    path = tmp_path / "run.json"
    longer, shorter = run(num_rounds=6), run(num_rounds=3)
    run(num_rounds=4, history_path=path)
    assert run(num_rounds=6, history_path=path).outcome() == longer.outcome()

    def never(*args):
        raise AssertionError("nothing is left to fit")

    never.__qualname__ = nearest_mean.__qualname__
    assert run(num_rounds=3, history_path=path, posterior=never).outcome() == shorter.outcome()
    assert History.from_json(json.loads(path.read_text())).outcome() == longer.outcome()


def test_a_file_of_another_run_is_left_alone(tmp_path):
    path = tmp_path / "run.json"
    run(history_path=path)
    before = path.read_text()
    with pytest.raises(ValueError, match=r"other settings \(seed: 0 there, 1 here\).*another `history_path`"):
        run(seed=1, history_path=path)
    with pytest.raises(ValueError, match="model: "):
        run(history_path=path, model=BNN(nn.Sequential(nn.Linear(4, NUM_CLASSES))))
    with pytest.raises(ValueError, match="began with other labels"):
        run(history_path=path, initial=[0, 1, 2])
    assert path.read_text() == before


def test_the_pool_can_be_looked_at_in_part():
    history = run(pool_subset=2, num_rounds=3)
    assert all(len(one.wanted) == 2 for one in history.rounds)
    assert history.labelled != run(num_rounds=3).labelled


def test_a_pool_may_be_used_up():
    history = run(pool=data(7), num_rounds=3)
    assert sorted(history.labelled) == list(range(7))
    assert history.wanted == []
    with pytest.raises(ValueError, match="4 rounds need 9 labels, and the pool has 7"):
        run(pool=data(7))


def test_a_balanced_choice():
    y = torch.tensor([0, 0, 0, 1, 1, 2])
    assert balanced(y, 3) == [0, 3, 5]
    assert sorted(balanced(y, 5)) == [0, 1, 3, 4, 5]
    drawn = balanced(y.repeat(5), 6, seed=1)
    assert sorted(y.repeat(5)[drawn].tolist()) == [0, 0, 1, 1, 2, 2]
    assert drawn != balanced(y.repeat(5), 6, seed=2)
    with pytest.raises(ValueError, match="from 1 to 6"):
        balanced(y, 7)


def test_a_classifier_that_is_no_bnn_and_a_chain():
    chain = active_learning.Chain(0.02, num_samples=20, warmup_steps=20, thinning=2, num_chains=2)
    history = run(model=Classifier(), posterior=chain, initial=30, num_rounds=2, num_score_draws=20, num_test_draws=40)
    assert history.accuracy[-1] > 0.8  # 0.97 or 1 for each of eight seeds
    assert history.settings["posterior"].startswith("Chain(step_size=0.02")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"retraining": "hot"}, "retraining='hot' must be one of 'cold', 'warm'"),
        ({"num_rounds": 0}, "num_rounds=0 must be a positive integer"),
        ({"pool_subset": 0}, "pool_subset=0 must be a positive integer"),
        ({"acquisition": "entropy"}, "`acquisition` must be one of"),
        ({"initial": [0, 0, 1]}, "distinct positions from 0 to 39"),
        ({"initial": [0, 40]}, "distinct positions from 0 to 39"),
        ({"initial": 2.5}, "`initial` must be a number, or distinct positions .* got 2.5"),
        ({"initial": "ab"}, "`initial` must be a number, or distinct positions .* got 'ab'"),
        ({"initial": [1.5, 2]}, r"`initial` must be a number, or distinct positions .* got \[1.5, 2\]"),
        ({"pool": (torch.full((40, 4), torch.nan), torch.zeros(40))}, "`x_pool` holds NaN or infinity in 40 of 40"),
        ({"pool": (torch.zeros(40, 4), torch.full((40,), -1))}, "`y_pool` must be whole numbers .* got -1 in row 0"),
        ({"initial": 0}, "initial=0 must be an integer from 1 to 40"),
        (
            {"pool": (torch.zeros(5, 4), torch.zeros(4))},
            r"`y_pool` must be .* each of 5 data, \(5,\); got shape \(4,\)",
        ),
        ({"pool": ([0.0], torch.zeros(4))}, "`x_pool` must be a tensor of inputs .*; got list"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        run(**change)


def test_what_is_no_posterior_is_refused():
    with pytest.raises(TypeError, match=r"`posterior` must be an MCMC .* got int"):
        run(posterior=lambda *args: 3)


def test_a_regression_is_refused():
    model = BNN(nn.Linear(4, 1), likelihood="gaussian", noise_scale=1.0)

    def weights(*args):
        return {"net.weight": torch.zeros(3, 1, 4), "net.bias": torch.zeros(3, 1)}

    with pytest.raises(ModelError, match="needs class probabilities; site 'obs' is of kind 'normal'"):
        run(model=model, posterior=weights)
