# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from pyro_apd import metrics

PROBS = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.6, 0.4], [0.2, 0.8]], dtype=torch.float64)
LABELS = torch.tensor([0, 0, 1, 0])


def test_hand_computed():
    assert metrics.accuracy(PROBS, LABELS) == 0.5
    assert metrics.negative_log_likelihood(PROBS, LABELS) == pytest.approx(-math.log(0.9 * 0.6 * 0.4 * 0.2) / 4)
    # Bins: 0.9 alone (gap 0.1), 0.6 twice (half right, gap 0.1), 0.8 alone (wrong, gap 0.8).
    assert metrics.expected_calibration_error(PROBS, LABELS) == pytest.approx((0.1 + 2 * 0.1 + 0.8) / 4)
    # Of two classes, twice the square of what the label lacks.
    assert metrics.brier_score(PROBS, LABELS) == pytest.approx(2 * (0.1**2 + 0.4**2 + 0.6**2 + 0.8**2) / 4)
    assert metrics.brier_score(torch.eye(3), torch.tensor([0, 1, 0])) == pytest.approx(2 / 3)


def test_one_bin_compares_mean_confidence_with_accuracy():
    assert metrics.expected_calibration_error(PROBS, LABELS, num_bins=1) == pytest.approx(abs(2.9 / 4 - 0.5))


def test_bins_are_closed_above():
    probs = torch.tensor([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]], dtype=torch.float64)
    count, confidence, accuracy = metrics.calibration_bins(probs, torch.tensor([0, 0, 1]), num_bins=2)
    assert count.tolist() == [1, 2]
    assert confidence.tolist() == [0.5, 0.875]
    assert accuracy.tolist() == [1, 0.5]


def test_agrees_with_scikit_learn():
    probs = torch.softmax(2 * torch.randn(200, 5, dtype=torch.float64), -1)
    labels = torch.randint(5, (200,))
    assert metrics.accuracy(probs, labels) == pytest.approx(accuracy_score(labels, probs.argmax(-1)))
    assert metrics.negative_log_likelihood(probs, labels) == pytest.approx(log_loss(labels, probs, labels=range(5)))


def test_impossible_label_costs_infinity():
    assert metrics.negative_log_likelihood(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == math.inf


def test_perfectly_calibrated_prediction_has_no_error():
    probs = torch.full((10, 2), 0.5, dtype=torch.float64)
    labels = torch.tensor([0, 1] * 5)
    assert metrics.expected_calibration_error(probs, labels) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.slow
@given(
    hnp.arrays(np.int64, st.integers(1, 20), elements=st.integers(0, 5)),
    hnp.arrays(np.int64, st.integers(1, 20), elements=st.integers(0, 5)),
)
@settings(max_examples=100, deadline=None)
def test_auroc_agrees_with_scikit_learn_and_averages_ties(inside, outside):
    truth = np.r_[np.zeros(len(inside)), np.ones(len(outside))]
    expected = roc_auc_score(truth, np.r_[inside, outside])
    inside, outside = torch.from_numpy(inside), torch.from_numpy(outside)
    assert metrics.auroc(inside, outside) == pytest.approx(expected, abs=1e-12)
    assert metrics.auroc(outside, inside) == pytest.approx(1 - expected, abs=1e-12)


def test_auroc_extremes():
    low, high = torch.tensor([0.0, 1.0]), torch.tensor([2.0, math.inf])
    assert metrics.auroc(low, high) == 1.0
    assert metrics.auroc(high, low) == 0.0
    assert metrics.auroc(torch.zeros(3), torch.zeros(4)) == 0.5


@pytest.mark.parametrize("function", [metrics.accuracy, metrics.negative_log_likelihood, metrics.calibration_bins])
@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        (PROBS, LABELS[:3], r"labels_N must .*each of 4 data, \(4,\); got shape \(3,\)"),
        (PROBS[0], LABELS, r"probs_NK must have shape \(data, classes\).* got \(2,\)"),
        (PROBS.unsqueeze(0), LABELS, r"got \(1, 4, 2\). Average over draws"),
        (PROBS * math.nan, LABELS, "probs_NK holds 8 NaN"),
        (torch.where(PROBS > 0.85, math.nan, PROBS), LABELS, "probs_NK holds 1 NaN"),
        (PROBS.log(), LABELS, r"probs_NK holds negative .* not logits or log-probabilities: use softmax"),
        (3 * PROBS, LABELS, r"probs_NK must sum to one .* logits need softmax\(-1\)"),
        (PROBS[:, :1], LABELS, r"single probability p of a binary label is \(1 - p, p\)"),
        (PROBS.long(), LABELS, "floating-point tensor of class probabilities; got shape .* of torch.int64"),
        (PROBS.numpy(), LABELS, r"got ndarray. Use torch.as_tensor"),
        (PROBS.to_sparse(), LABELS, r"\(sparse\).*to_dense"),
        (PROBS[:, :0], LABELS, "at least one class"),
        (PROBS, LABELS.numpy(), "labels_N must be a tensor of classes.* got ndarray"),
        (PROBS, LABELS * math.nan, "whole numbers from 0 to 1; got nan in row 0"),
        (PROBS, LABELS.cfloat(), "complex"),
        (PROBS[:0], LABELS[:0], "at least one datum"),
        (PROBS, LABELS + 1, "from 0 to 1; got 2 in row 2, and values from 1 to 2"),
        (PROBS, LABELS - 1, "from -1 to 0"),
        (PROBS, LABELS + 0.5, "whole numbers"),
    ],
)
def test_errors_say_what_came(function, probs, labels, message):
    with pytest.raises(ValueError, match=message):
        function(probs, labels)


def test_other_errors():
    with pytest.raises(ValueError, match=r"num_bins.*0"):
        metrics.expected_calibration_error(PROBS, LABELS, num_bins=0)
    with pytest.raises(ValueError, match=r"scores_in.*0 scores"):
        metrics.auroc(torch.empty(0), torch.ones(2))
    with pytest.raises(ValueError, match="scores_out"):
        metrics.auroc(torch.ones(2), torch.tensor([math.nan]))


@pytest.mark.parametrize("scores", [[0.1, 0.2], np.zeros(3), None, torch.zeros(3).cfloat(), torch.eye(3).to_sparse()])
def test_scores_that_are_none(scores):
    with pytest.raises(ValueError, match="scores_in must be a tensor of real scores; got "):
        metrics.auroc(scores, torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_probabilities_of_few_digits_are_accepted(dtype):
    probs = torch.softmax(torch.randn(100, 7, generator=torch.Generator().manual_seed(0)), -1).to(dtype)
    labels = torch.arange(100, dtype=torch.int32) % 7
    assert metrics.accuracy(probs, labels) == metrics.accuracy(probs, labels.double())
    assert math.isfinite(metrics.negative_log_likelihood(probs.requires_grad_(), labels))


@pytest.mark.parametrize("num_bins", [0, -1, 2.5, True, "3"])
def test_numbers_of_bins_that_are_none(num_bins):
    with pytest.raises(ValueError, match="num_bins="):
        metrics.expected_calibration_error(PROBS, LABELS, num_bins)


def test_regression_metrics_by_hand():
    y = torch.tensor([0.0, 1.0, 3.0])
    assert metrics.root_mean_squared_error(torch.tensor([0.0, 2.0, 1.0]), y) == pytest.approx(math.sqrt(5 / 3))
    low, high = torch.tensor([0.0, 0.0, 4.0]), torch.tensor([0.5, 1.0, 5.0])
    assert metrics.interval_coverage(low, high, y) == pytest.approx(2 / 3)
    # Pairs (0, 2), (1, 1), (3, 6): E|Y - y| = 1, 0, 1.5; E|Y - Y'| of different samples = 2, 0, 3.
    samples = torch.tensor([[0.0, 1.0, 3.0], [2.0, 1.0, 6.0]])
    assert metrics.crps(samples, y) == pytest.approx((1 - 1 + 0 + 1.5 - 1.5) / 3)
    assert metrics.crps(samples[:1] + 1, y) == 1.0  # the absolute error


def test_crps_of_pairs_of_all_samples():
    samples, y = torch.randn(7, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    spread = (samples.unsqueeze(0) - samples.unsqueeze(1)).abs().sum((0, 1)) / (7 * 6)
    assert metrics.crps(samples, y) == pytest.approx(float(((samples - y).abs().mean(0) - spread / 2).mean()))


def test_crps_of_a_normal_distribution():
    """Closed form: Gneiting & Raftery 2007, eq. 5."""
    torch.manual_seed(0)
    y, normal = torch.tensor([0.7], dtype=torch.float64), torch.distributions.Normal(0.0, 1.0)
    exact = 0.7 * (2 * float(normal.cdf(y)) - 1) + 2 * float(normal.log_prob(y).exp()) - 1 / math.sqrt(math.pi)
    samples = torch.randn(200_000, 1, dtype=torch.float64)
    assert metrics.crps(samples, y) == pytest.approx(exact, abs=0.005)
    column = y.numpy()
    column.setflags(write=False)  # as those of a frame are
    assert metrics.crps(samples.numpy(), column) == metrics.crps(samples, y)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: metrics.crps(torch.zeros(3), torch.zeros(3)), "samples_SN has shape .*a dimension of samples"),
        (lambda: metrics.root_mean_squared_error(torch.zeros(2), torch.zeros(3)), r"mean_N has shape \(2,\) beside"),
        (lambda: metrics.root_mean_squared_error(torch.zeros(0), torch.zeros(0)), "at least one datum"),
        (lambda: metrics.root_mean_squared_error([1.0], torch.zeros(1)), "mean_N must be a tensor or array.*got list"),
        (lambda: metrics.root_mean_squared_error(torch.zeros(1), torch.tensor([torch.nan])), "targets_N must hold fin"),
        (lambda: metrics.interval_coverage(torch.ones(1), torch.zeros(1), torch.zeros(1)), "must not exceed upper_N"),
    ],
)
def test_bad_regressions(call, match):
    with pytest.raises(ValueError, match=match):
        call()
