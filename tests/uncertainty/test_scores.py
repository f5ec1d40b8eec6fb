# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from pyro_apd import uncertainty

SCORES = [
    uncertainty.expected_entropy,
    uncertainty.max_probability,
    uncertainty.model_variance,
    uncertainty.mutual_information,
    uncertainty.predictive_entropy,
    uncertainty.variation_ratio,
]
LOG2 = math.log(2.0)

# Two draws of three data: they agree and are sure; agree and are unsure; disagree and are sure.
PROBS = torch.tensor([[[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]], [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]], dtype=torch.float64)


@st.composite
def probabilities(draw):
    """Softmax of logits so far apart that some probabilities underflow to zero."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5)))
    logits = draw(hnp.arrays(np.float64, shape, elements=st.floats(-400.0, 400.0, width=32)))
    return torch.softmax(torch.from_numpy(logits), -1)


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (uncertainty.predictive_entropy, [0.0, LOG2, LOG2]),
        (uncertainty.expected_entropy, [0.0, LOG2, 0.0]),
        (uncertainty.mutual_information, [0.0, 0.0, LOG2]),
        (uncertainty.variation_ratio, [0.0, 0.0, 0.5]),
        (uncertainty.max_probability, [1.0, 0.5, 0.5]),
        (uncertainty.model_variance, [0.0, 0.0, 0.5]),
    ],
)
def test_hand_computed(score, expected):
    assert torch.allclose(score(PROBS), torch.tensor(expected, dtype=torch.float64), atol=1e-15)


def test_variation_ratio_counts_the_modal_vote_not_the_mean():
    # Two draws vote narrowly for class 0, one strongly for class 1: the mean says 1, the vote says 0.
    probs = torch.tensor([[[0.51, 0.49]], [[0.51, 0.49]], [[0.0, 1.0]]])
    assert uncertainty.variation_ratio(probs).item() == pytest.approx(1 / 3)
    assert probs.mean(0).argmax(-1).item() == 1


def test_model_variance_is_the_formula_of_feinman():
    probs = torch.softmax(torch.randn(7, 5, 4, dtype=torch.float64), -1)
    expected = (probs**2).sum(-1).mean(0) - (probs.mean(0) ** 2).sum(-1)
    assert torch.allclose(uncertainty.model_variance(probs), expected, atol=1e-14)


@pytest.mark.slow
@given(probabilities())
@settings(max_examples=200, deadline=None)
def test_information_inequalities(probs):
    total, within = uncertainty.predictive_entropy(probs), uncertainty.expected_entropy(probs)
    information = uncertainty.mutual_information(probs)
    num_draws, _, num_classes = probs.shape
    assert (information >= 0).all()
    assert (information <= total + 1e-12).all()
    assert (information <= math.log(num_draws) + 1e-12).all()
    assert (total <= math.log(num_classes) + 1e-12).all()
    assert torch.allclose(information, (total - within).clamp_min(0), atol=1e-12)
    assert (uncertainty.variation_ratio(probs) <= 1 - 1 / min(num_draws, num_classes) + 1e-12).all()
    assert (uncertainty.max_probability(probs) >= 1 / num_classes - 1e-12).all()


@pytest.mark.slow
@given(probabilities(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_order_of_draws_does_not_matter(probs, random):
    order = list(range(len(probs)))
    random.shuffle(order)
    for score in SCORES:
        assert torch.allclose(score(probs), score(probs[order]), atol=1e-12)


@given(probabilities())
@settings(max_examples=60, deadline=None)
def test_a_single_draw_has_no_model_uncertainty(probs):
    one = probs[:1]
    for score in (uncertainty.mutual_information, uncertainty.variation_ratio, uncertainty.model_variance):
        assert (score(one) == 0).all()
    torch.testing.assert_close(uncertainty.predictive_entropy(one), uncertainty.expected_entropy(one))


def test_equal_draws_have_exactly_no_model_uncertainty():
    # A mean of seven equal numbers is not that number in floating point; what is left over must not rank data.
    probs = torch.softmax(torch.randn(1, 200, 10), -1).expand(7, 200, 10)
    assert (uncertainty.mutual_information(probs) == 0).all()
    assert (uncertainty.model_variance(probs) == 0).all()
    assert (probs.mean(0) != probs[0]).any()


def test_small_information_keeps_its_digits_in_single_precision():
    logits = torch.randn(1, 50, 10, dtype=torch.float64) + 1e-3 * torch.randn(20, 50, 10, dtype=torch.float64)
    probs = torch.softmax(logits, -1)
    exact = uncertainty.mutual_information(probs)
    assert torch.allclose(uncertainty.mutual_information(probs.float()).double(), exact, rtol=0.05, atol=2e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_softmax_of_any_dtype_is_accepted(dtype):
    probs = torch.softmax(3 * torch.randn(4, 30, 1000), -1).to(dtype)
    for score in SCORES:
        values = score(probs)
        assert values.shape == (30,)
        assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert values.isfinite().all()


def test_scores_are_differentiable():
    logits = torch.randn(3, 2, 4, requires_grad=True)
    uncertainty.mutual_information(logits.softmax(-1)).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("probs", "message"),
    [
        ([[0.5, 0.5]], "floating-point tensor.*list"),
        (torch.ones(2, 3, 1, dtype=torch.long), "floating-point tensor.*int64"),
        (torch.full((3, 2), 0.5), r"\(3, 2\).*unsqueeze"),
        (torch.ones(0, 3, 1), r"at least one draw.*\(0, 3, 1\)"),
        (torch.ones(2, 3, 0), "one class"),
        (torch.tensor([[[0.5, float("nan")]]]), "1 NaN"),
        (torch.tensor([[[1.5, -0.5]]]), "negative.*-0.5.*softmax"),
        (torch.full((2, 3, 4), 0.3), "sum to one.*1.2"),
        (torch.tensor([[[float("inf"), 0.0]]]), "sum to one.*inf"),
        (torch.log_softmax(torch.randn(2, 3, 4), -1), "negative"),
    ],
)
def test_errors_say_what_came(score, probs, message):
    with pytest.raises(ValueError, match=message):
        score(probs)


def test_no_data_gives_no_scores():
    for score in SCORES:
        assert score(torch.ones(2, 0, 3)).shape == (0,)


# Definitions of others: neither library is installed with the tests, so their formulas are written out.


def test_scores_are_those_of_scikit_activeml():
    """Of ``skactiveml.pool``: entropy, least confidence, ``_bald`` and ``vote_entropy``'s votes, by members M."""
    probs_SNK = torch.softmax(2 * torch.randn(9, 20, 5, dtype=torch.float64), -1)
    mean = probs_SNK.mean(0).numpy()
    entropy = -np.sum(mean * np.log(mean), axis=1)
    members = np.transpose(probs_SNK.numpy(), (1, 0, 2))
    within = np.mean(-np.sum(members * np.log(members), axis=2), axis=1)
    assert np.allclose(uncertainty.predictive_entropy(probs_SNK), entropy)
    assert np.allclose(1 - uncertainty.max_probability(probs_SNK), 1 - mean.max(axis=1))
    assert np.allclose(uncertainty.mutual_information(probs_SNK), entropy - within)


def test_scores_are_those_of_torch_uncertainty():
    """``MutualInformation``, ``Entropy`` and ``VariationRatio(probabilistic=False)``, from estimators first."""
    probs_SNK = torch.softmax(2 * torch.randn(9, 20, 5, dtype=torch.float64), -1)
    ensemble, mean = probs_SNK.transpose(0, 1), probs_SNK.mean(0)
    within = torch.special.entr(ensemble).sum(-1).mean(1)
    assert torch.allclose(uncertainty.mutual_information(probs_SNK), torch.special.entr(mean).sum(-1) - within)
    votes = torch.nn.functional.one_hot(ensemble.argmax(-1), 5).sum(1)
    assert torch.allclose(uncertainty.variation_ratio(probs_SNK), 1 - votes.max(-1).values.double() / 9)


# Two draws of three data: means agree, are two apart, agree; variances 1 and 3, then 2, then 0.
MEAN = torch.tensor([[5.0, 0.0, 1.0], [5.0, 2.0, 1.0]], dtype=torch.float64)
VARIANCE = torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 0.0]], dtype=torch.float64)


def test_variances_by_hand():
    assert uncertainty.aleatoric_variance(VARIANCE).tolist() == [2.0, 2.0, 0.0]
    assert uncertainty.epistemic_variance(MEAN).tolist() == [0.0, 1.0, 0.0]
    assert uncertainty.total_variance(MEAN, VARIANCE).tolist() == [2.0, 3.0, 0.0]


def test_total_variance_is_that_of_the_mixture():
    mean_SN, scale_SN = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(3, 5)), torch.distributions.Normal(mean_SN.T, scale_SN.T)
    )
    assert torch.allclose(uncertainty.total_variance(mean_SN, scale_SN**2), mixture.variance)


def test_equal_draws_have_exactly_no_epistemic_variance():
    mean_SN = (1e4 * torch.randn(1, 100)).expand(7, 100)
    assert (uncertainty.epistemic_variance(mean_SN) == 0).all()


@given(probabilities(), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_streams_of_classes_agree_with_all_draws_at_once(probs_SNK, chunk):
    stream = uncertainty.ClassificationStream()
    for part_SNK in probs_SNK.split(chunk):
        stream.add(part_SNK)
    scores = stream.result()
    assert torch.allclose(scores.pop("mean_probability"), probs_SNK.mean(0), atol=1e-14)
    assert set(scores) == {score.__name__ for score in SCORES}
    for name, value_N in scores.items():
        assert torch.allclose(value_N, getattr(uncertainty, name)(probs_SNK), atol=1e-9), name


@pytest.mark.parametrize("chunk", [1, 3, 20])
def test_streams_of_moments_agree_with_all_draws_at_once(chunk):
    mean_SN, variance_SN = 1e3 + torch.randn(20, 6), torch.rand(20, 6)
    stream = uncertainty.RegressionStream()
    for part in range(0, 20, chunk):
        stream.add(mean_SN[part : part + chunk], variance_SN[part : part + chunk])
    found = stream.result()
    assert torch.allclose(found["mean"], mean_SN.mean(0))
    assert torch.allclose(found["expected_variance"], uncertainty.aleatoric_variance(variance_SN))
    assert torch.allclose(found["model_variance"], uncertainty.epistemic_variance(mean_SN), rtol=1e-4)
    assert torch.allclose(found["variance"], uncertainty.total_variance(mean_SN, variance_SN), rtol=1e-4)


def test_a_stream_goes_on_after_a_result():
    stream = uncertainty.ClassificationStream("model_variance").add(PROBS[:1])
    assert stream.result()["model_variance"].tolist() == [0.0, 0.0, 0.0]
    assert stream.add(PROBS[1:]).result()["model_variance"].tolist() == pytest.approx([0.0, 0.0, 0.5])


def test_streams_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="no draws yet"):
        uncertainty.ClassificationStream().result()
    with pytest.raises(ValueError, match=r"`names` must name some of mean_probability.*\['entropy'\]"):
        uncertainty.ClassificationStream(["entropy"])
    with pytest.raises(ValueError, match=r"`names` must name some of mean, variance"):
        uncertainty.RegressionStream(["predictive_entropy"])
    with pytest.raises(ValueError, match=r"same data.*\(3, 2\).*\(2, 2\)"):
        uncertainty.ClassificationStream().add(PROBS).add(PROBS[:, :2])
    with pytest.raises(ValueError, match="sum to one"):
        uncertainty.ClassificationStream().add(torch.ones(1, 2, 3))


@pytest.mark.parametrize(
    ("mean", "variance", "message"),
    [
        ([1.0], torch.ones(1, 1), "mean_SN must be a floating-point.*list"),
        (torch.ones(3), torch.ones(1, 1), r"mean_SN.*\(3,\).*unsqueeze"),
        (torch.ones(2, 3), torch.ones(3, 2), r"same shape.*\(2, 3\).*\(3, 2\)"),
        (torch.ones(2, 3), -torch.ones(2, 3), "variance_SN holds 6 entries.*logarithms"),
        (torch.full((2, 3), math.nan), torch.ones(2, 3), "mean_SN holds 6 entries"),
        (torch.ones(0, 3), torch.ones(0, 3), "at least one draw"),
    ],
)
def test_moments_that_are_none(mean, variance, message):
    with pytest.raises(ValueError, match=message):
        uncertainty.total_variance(mean, variance)
    with pytest.raises(ValueError, match=message):
        uncertainty.RegressionStream().add(mean, variance)
