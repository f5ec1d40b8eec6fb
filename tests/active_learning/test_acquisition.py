# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Scores, and the choice of a batch."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pyro_apd import uncertainty
from pyro_apd.active_learning import ACQUISITIONS, SCORES, batch_bald, mean_sd, select


def probabilities(seed=0, draws=6, data=8, classes=3, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(draws, data, classes, generator=generator, dtype=torch.float64)
    return logits.softmax(-1)


def information_of(probs_SNK, batch):
    """Mutual information of the labels of a batch and the draw, by summing over every configuration."""
    joint = 0.0
    for labels in itertools.product(range(probs_SNK.shape[2]), repeat=len(batch)):
        probs_S = torch.stack([probs_SNK[:, i, k] for i, k in zip(batch, labels, strict=True)]).prod(0)
        joint += torch.special.entr(probs_S.mean())
    return float(joint - uncertainty.expected_entropy(probs_SNK)[list(batch)].sum())


def test_mean_sd_of_a_case_done_by_hand():
    # Class probabilities (.2, .8) and (.6, .4): a deviation of .2 in each class.
    probs = torch.tensor([[[0.2, 0.8]], [[0.6, 0.4]]])
    assert_close(mean_sd(probs), torch.tensor([0.2]))
    assert_close(mean_sd(probs.half()), torch.tensor([0.2]), atol=1e-3, rtol=0)
    assert mean_sd(probs[:1]).item() == 0.0
    with pytest.raises(ValueError, match="sum to one"):
        mean_sd(2 * probs)


def test_the_scores_are_those_of_uncertainty():
    probs = probabilities()
    for name, function in SCORES.items():
        order = function(probs).argsort(descending=True)
        if name != "variation_ratio":  # which has ties
            assert torch.equal(select(name, probs, 3), order[:3])
    assert set(ACQUISITIONS) == {"random", *SCORES, "batch_bald"}


def test_equal_scores_are_ordered_by_the_seed():
    probs = torch.full((2, 40, 2), 0.5)
    chosen = [select("variation_ratio", probs, 5, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])
    assert not torch.equal(chosen[0].sort().values, torch.arange(5))
    assert not torch.equal(select("random", probs, 5, seed=0), select("random", probs, 5, seed=2))


def test_the_first_choice_of_batch_bald_is_that_of_bald():
    probs = probabilities()
    chosen, information = batch_bald(probs, 1)
    scores = uncertainty.mutual_information(probs)
    assert chosen.tolist() == [int(scores.argmax())]
    assert_close(information, scores.max().reshape(1))


def test_batch_bald_is_greedy_in_the_exact_joint_information():
    probs = probabilities(sharpness=4.0)
    chosen, information = batch_bald(probs, 3)
    batch = []
    for step in range(3):
        gains = {i: information_of(probs, [*batch, i]) for i in range(probs.shape[1]) if i not in batch}
        best = max(gains, key=gains.get)
        assert chosen[step] == best
        assert math.isclose(information[step], gains[best], rel_tol=1e-9)
        batch.append(best)


def test_sampled_configurations_come_near_the_exact_sum():
    probs = probabilities(draws=10, sharpness=4.0)
    exact = batch_bald(probs, 5, max_configurations=3**5)
    sampled = batch_bald(probs, 5, max_configurations=200, seed=2)
    assert torch.equal(exact[0], sampled[0])
    # The first four are exact in both: 81 configurations of four labels fit into 200.
    assert_close(exact[1][:4], sampled[1][:4])
    few = batch_bald(probs, 5, max_configurations=80, seed=2)
    assert not torch.equal(few[1], exact[1])
    seeds = [batch_bald(probs, 5, max_configurations=80, seed=seed)[1] for seed in range(50)]
    # A single estimate has a standard deviation of 0.12 nats.
    assert_close(torch.stack(seeds).mean(0), exact[1], atol=0.06, rtol=0)
    assert torch.equal(few[1], batch_bald(probs, 5, max_configurations=80, seed=2)[1])


def test_batch_bald_does_not_ask_the_same_twice():
    # Four draws: two bits. Data 0 and 1 both tell the first bit, datum 2 the second, a little less surely.
    bit = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    sure = torch.tensor([0.999, 0.999, 0.99], dtype=torch.float64)
    p = torch.where(bit > 0, sure, 1 - sure)
    probs = torch.stack([p, 1 - p], dim=-1)
    assert set(select("bald", probs, 2).tolist()) == {0, 1}
    chosen, information = batch_bald(probs, 2)
    assert 2 in chosen.tolist()
    assert_close(information[1], torch.tensor(2 * math.log(2), dtype=torch.float64), atol=0.07, rtol=0)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**16),
    draws=st.integers(1, 5),
    data=st.integers(1, 7),
    classes=st.integers(2, 4),
    batch=st.integers(1, 9),
    name=st.sampled_from(ACQUISITIONS),
)
def test_a_batch_is_distinct_data(seed, draws, data, classes, batch, name):
    probs = probabilities(seed, draws, data, classes)
    chosen = select(name, probs, batch, seed=seed).tolist()
    assert len(set(chosen)) == len(chosen) == min(batch, data)
    assert all(0 <= i < data for i in chosen)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**16), most=st.sampled_from([4, 30, 2000]))
def test_the_information_of_a_batch_grows_and_has_a_bound(seed, most):
    probs = probabilities(seed, draws=5, sharpness=5.0)
    _, information = batch_bald(probs, 4, max_configurations=most, seed=seed)
    assert (information >= 0).all()
    if most == 2000:  # exact: what is known of one of five draws is at most log 5
        assert (information.diff() >= -1e-9).all()
        assert information[-1] <= math.log(5) + 1e-9


def test_an_acquisition_of_ones_own():
    probs = probabilities()
    assert select(lambda p: p[0, :, 0], probs, 1).item() == int(probs[0, :, 0].argmax())
    with pytest.raises(ValueError, match=r"must give 8 finite scores, .* shape \(6, 8\)"):
        select(lambda p: p[:, :, 0], probs, 1)
    with pytest.raises(ValueError, match="finite scores"):
        select(lambda p: p[0, :, 0] * torch.nan, probs, 1)


def test_what_is_refused():
    probs = probabilities()
    with pytest.raises(ValueError, match=r"`acquisition` must be one of 'random', .* got 'entropy'"):
        select("entropy", probs, 1)
    for wrong in (0, True, 1.5):
        with pytest.raises(ValueError, match=f"batch_size={wrong} must be a positive integer"):
            select("bald", probs, wrong)
    with pytest.raises(ValueError, match="batch_size=9 must be an integer from 1 to 8"):
        batch_bald(probs, 9)
    with pytest.raises(ValueError, match="max_configurations"):
        batch_bald(probs, 2, max_configurations=0)
    for name in ACQUISITIONS:
        for wrong in (probs.tolist(), None, probs[0], probs.to_sparse()):
            with pytest.raises(ValueError, match="probs_SNK must "):
                select(name, wrong, 1)
    for name in (*SCORES, "batch_bald"):
        with pytest.raises(ValueError, match=r"probs_SNK holds .* NaN"):
            select(name, probs * torch.nan, 1)
    with pytest.raises(ValueError, match="probs_SNK must sum to one"):
        select(lambda p: p[0, :, 0], 2 * probs, 1)
