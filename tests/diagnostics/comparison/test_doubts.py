# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

from types import SimpleNamespace

import pytest

from pyro_apd.diagnostics.comparison.doubts import doubts
from pyro_apd.diagnostics.comparison.verdict import NO_PREDICTIONS, Row, overall

GOOD = Row("accuracy", "accuracy", "function space", 0.9, 0.9, 0.9, 0.01, "indistinguishable", "same")
LOST = Row("nll", "NLL", "function space", 0.9, 1.9, 0.9, 0.01, "loses", "loses 50%")
WEIGHTS = Row("weight_sd_ratio_50", "ratio", "weight space", 1.0, 1.0, 1.0, 0.1, "indistinguishable", "same")


def posterior(**metadata):
    return SimpleNamespace(metadata=metadata)


def test_nothing_is_doubted_where_nothing_was_warned_of():
    assert doubts({}, {}) == []
    assert doubts({}, posterior(sampler={"kernel": "SGLD", "excursions": 0, "warnings": []})) == []


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"sampler": {"warnings": ["The warm-up was short. Use more."]}}, "The run warned: The warm-up was short."),
        ({"sampler": {"excursions": 2, "warnings": []}}, "The chains made 2 excursions to where they do not belong."),
        ({"warnings": ["draws disagree 2 times as much"]}, "The distillation warned: draws disagree 2 times as much."),
        ({"warnings": ["x" * 999]}, f"The distillation warned: {'x' * 237}..."),
    ],
)
def test_warnings_of_run_and_distillation_are_doubts(metadata, expected):
    assert doubts({}, posterior(**metadata)) == [expected]


@pytest.mark.parametrize("metadata", [{"sampler": "SGLD", "warnings": "no"}, {"sampler": {"warnings": 3}}, {"x": 1}])
def test_metadata_of_others_are_no_error(metadata):
    assert doubts({}, posterior(**metadata)) == []


def test_what_the_run_itself_knows_comes_before_the_files_note():
    stored = SimpleNamespace(sampler_summary={"warnings": ["Short."]})
    assert doubts(stored, posterior(sampler={"warnings": ["Other."]})) == ["The run warned: Short."]


def test_a_doubted_comparison_is_never_good_and_a_loss_stays_one():
    status, words = overall([GOOD], 0.0, True, ["The run warned: short."])
    assert status == "unclear"
    assert words.startswith("The run warned: short. Apart from that: indistinguishable")
    assert overall([GOOD, LOST], 0.0, True, ["The run warned: short."])[0] == "loses"


def test_weights_alone_show_no_absence_of_loss():
    status, words = overall([WEIGHTS], float("nan"), True)
    assert status == "unclear"
    assert words.startswith(NO_PREDICTIONS)
