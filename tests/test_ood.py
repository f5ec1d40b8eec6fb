# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Figures of detection by hand, against two libraries, and through every kind of posterior."""

import hypothesis.strategies as st
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from pyro.infer import MCMC
from torch.testing import assert_close

import pyro_apd as apd
from pyro_apd import ood
from pyro_apd.ood import METRICS, _of_ranks, _resampled, rank_metrics
from tests.support.models import Classifier

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
SITES = {"first.weight": (6, 4), "first.bias": (6,), "second.weight": (3, 6), "second.bias": (3,)}
# Few distinct values, so that many tie.
SCORES = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=25).map(torch.tensor)


def draws(count=20):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(count, *shape, generator=generator) for name, shape in SITES.items()}


def test_metrics_by_hand():
    found = rank_metrics(torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([2.5, 4.0]))
    # From the top: out, in, out, in, in, in.
    assert found == pytest.approx(
        {
            "auroc": 7 / 8,
            "aupr_out": (1 + 2 / 3) / 2,
            "aupr_in": (1 + 1 + 1 + 4 / 5) / 4,
            "fpr95": 1 / 4,
        }
    )


def test_apart_and_alike():
    low, high = torch.rand(30), 2 + torch.rand(20)
    apart = {"auroc": 1.0, "aupr_out": 1.0, "aupr_in": 1.0, "fpr95": 0.0}
    assert rank_metrics(low, high) == pytest.approx(apart)
    assert rank_metrics(high, low)["auroc"] == 0.0
    alike = rank_metrics(torch.zeros(30), torch.zeros(20))
    assert alike == pytest.approx({"auroc": 0.5, "aupr_out": 0.4, "aupr_in": 0.6, "fpr95": 1.0})


@pytest.mark.slow
@given(SCORES, SCORES)
@settings(max_examples=50, deadline=None)
def test_metrics_are_those_of_scikit_learn(inside, outside):
    theirs = pytest.importorskip("sklearn.metrics")
    value = torch.cat([inside, outside]).numpy()
    is_out = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).numpy()
    false, true, _ = theirs.roc_curve(is_out, value, drop_intermediate=False)
    assert rank_metrics(inside, outside) == pytest.approx(
        {
            "auroc": theirs.roc_auc_score(is_out, value),
            "aupr_out": theirs.average_precision_score(is_out, value),
            "aupr_in": theirs.average_precision_score(1 - is_out, -value),
            "fpr95": false[(true >= 0.95).argmax()],
        }
    )


@given(SCORES, SCORES, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_data_that_count_twice_are_data_given_twice(inside, outside, seed):
    generator = torch.Generator().manual_seed(seed)
    counts = [torch.randint(0, 3, (len(part),), generator=generator) for part in (inside, outside)]
    for count in counts:
        count[0] += 1
    found = _of_ranks(apd.metrics.RankedScores(inside, outside, *(count[None] for count in counts)))
    repeated = rank_metrics(inside.repeat_interleave(counts[0]), outside.repeat_interleave(counts[1]))
    assert {name: float(value) for name, value in found.items()} == pytest.approx(repeated)


@given(SCORES, SCORES)
@settings(max_examples=20, deadline=None)
def test_metrics_are_those_of_torchmetrics(inside, outside):
    classification = pytest.importorskip("torchmetrics.functional.classification")
    value = torch.cat([inside, outside]) / 10  # torchmetrics takes what leaves [0, 1] for logits
    is_out = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).long()
    found = rank_metrics(inside, outside)
    assert found["auroc"] == pytest.approx(float(classification.binary_auroc(value, is_out)), abs=1e-5)
    precision = classification.binary_average_precision(value, is_out)
    assert found["aupr_out"] == pytest.approx(float(precision), abs=1e-5)


def test_calibration_is_that_of_torchmetrics():
    classification = pytest.importorskip("torchmetrics.functional.classification")
    probs_NK, labels_N = torch.softmax(torch.randn(200, 5), -1), torch.randint(5, (200,))
    theirs = classification.multiclass_calibration_error(probs_NK, labels_N, num_classes=5, n_bins=15)
    assert apd.metrics.expected_calibration_error(probs_NK, labels_N) == pytest.approx(float(theirs), abs=1e-5)


def test_intervals_cover_as_often_as_they_say():
    # Scores normal and a standard deviation apart: AUROC is Phi(1 / sqrt 2).
    truth, covered = float(torch.special.ndtr(torch.tensor(0.5**0.5))), 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        inside, outside = torch.randn(2, 60, generator=generator) + torch.tensor([[0.0], [1.0]])
        low, high = _resampled(inside, outside, 200, generator)["auroc"].quantile(
            torch.tensor([0.05, 0.95], dtype=torch.float64)
        )
        covered += int(low <= truth <= high)
    assert 165 <= covered <= 194  # 180 of 200, give or take three standard errors


def test_evaluate_finds_what_uncertainty_alone_gives():
    model, posterior = Classifier(), draws()
    found = ood.evaluate(model, posterior, X, {"far": 10 * X, "same": X}, num_bootstrap=50)
    inside, outside = (apd.outputs(model, posterior, x).probs_SNK for x in (X, 10 * X))
    for name in ("predictive_entropy", "mutual_information", "model_variance"):
        score = getattr(apd.uncertainty, name)
        expected = apd.metrics.auroc(score(inside), score(outside))
        assert found["far", name].metrics["auroc"].value == pytest.approx(expected, abs=1e-6)
    confidence = -apd.uncertainty.max_probability(inside), -apd.uncertainty.max_probability(outside)
    assert found["far", "max_probability"].metrics["auroc"].value == pytest.approx(apd.metrics.auroc(*confidence))
    same = found["same", "mutual_information"].metrics["auroc"]
    assert same.value == pytest.approx(0.5)
    assert same.low < 0.5 < same.high
    assert_close(found.scores_out["same"]["model_variance"], found.scores_in["model_variance"])


def test_the_result_as_records_table_and_text():
    found = ood.evaluate(Classifier(), draws(), X, 3 * X, scores="mutual_information", num_bootstrap=0)
    records = found.records()
    assert [record["metric"] for record in records] == list(METRICS)
    assert {(record["out"], record["score"], record["num_in"], record["num_out"]) for record in records} == {
        ("out", "mutual_information", 40, 40)
    }
    assert found.to_dict()["out"]["mutual_information"]["auroc"] == records[0]["value"]
    assert all(record["low"] != record["low"] for record in records)
    header, _, row = str(found).splitlines()
    assert header.split() == ["out", "score", *METRICS]
    assert f"{records[0]['value']:.4f}" in row
    with pytest.raises(KeyError, match=r"nothing for.*mutual_information"):
        found["out", "entropy"]


@pytest.mark.slow
def test_every_kind_of_posterior():
    model, y = Classifier(), (X[:, 0] > 0).long()
    mcmc = MCMC(apd.SGLD(model, 1e-3, seed=0), num_samples=12, warmup_steps=2, disable_progbar=True)
    mcmc.run(X, y)
    teacher = draws()
    student = torch.nn.Linear(4, 3)
    taught = apd.baselines.dark_knowledge(teacher, model, student, X, num_steps=2, seed=0, progress=False)
    posteriors = {
        "chain": mcmc,
        "generator": apd.baselines.low_rank(teacher, rank=2),
        "dropout": apd.baselines.mc_dropout(model, X, y, num_steps=2, seed=0, progress=False),
        "one": apd.baselines.map_estimate(model, X, y, num_steps=2, seed=0, progress=False),
        "student": taught,
    }
    before = torch.random.get_rng_state()
    for name, posterior in posteriors.items():
        results = [
            ood.evaluate(model, posterior, X, -5 * X, "predictive_entropy", num_samples=8, num_bootstrap=10, seed=3)
            for _ in range(2)
        ]
        assert results[0].records() == results[1].records(), name
    assert torch.equal(before, torch.random.get_rng_state())
    spaced = {name: value[[0, 2, 3, 5, 6, 8, 9, 11]] for name, value in mcmc.get_samples().items()}
    found = ood.evaluate(model, mcmc, X, -5 * X, num_samples=8, num_bootstrap=0)
    assert found.to_dict() == ood.evaluate(model, spaced, X, -5 * X, num_bootstrap=0).to_dict()


def regression(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)


def test_a_regression_is_scored_by_its_variances():
    found = ood.evaluate(regression, {"w": torch.randn(10, 4)}, X, 4 * X, num_bootstrap=0)
    assert [detection.score for detection in found.detections] == ["variance", "model_variance"]
    assert found["out", "variance"].metrics == found["out", "model_variance"].metrics  # noise is the same for all
    assert found["out", "variance"].metrics["auroc"].value > 0.8


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, r"num_samples.*0"),
        ({"num_bootstrap": -1}, ValueError, r"num_bootstrap"),
        ({"confidence": 1.0}, ValueError, r"confidence.*1\.0"),
        ({"scores": ["entropy"]}, ValueError, r"must name some of.*entropy"),
        ({"scores": ["mean_probability"]}, ValueError, r"must be uncertainties"),
        ({"in_data": torch.zeros(0, 4)}, ValueError, r"in_data.*\(0, 4\)"),
        ({"out_data": {"a": None}}, ValueError, r"out_data\['a'\].*NoneType"),
        ({"out_data": {}}, ValueError, r"holds no sets"),
        ({"posterior": 3}, TypeError, r"MCMC after run\(\).*int"),
        ({"out_data": torch.full((3, 4), float("nan"))}, ValueError, r"out_data\['out'\]. holds NaN"),
        (
            {"out_data": torch.full((3, 4), float("inf"))},
            ValueError,
            r"out_data\['out'\]. holds NaN or infinity in 3 of 3",
        ),
        ({"in_data": torch.eye(4).log()}, ValueError, r"`in_data` holds NaN or infinity in 4 of 4 rows"),
        ({"in_data": torch.eye(4).to_sparse()}, ValueError, r"`in_data` must .*sparse"),
        ({"scores": 3}, ValueError, r"`scores` must be names"),
    ],
)
def test_what_is_refused(settings, error, message):
    arguments = {"posterior": draws(), "in_data": X, "out_data": 2 * X, "num_bootstrap": 0, **settings}
    with pytest.raises(error, match=message):
        ood.evaluate(Classifier(), **arguments)
