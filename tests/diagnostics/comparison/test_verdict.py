# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest

from pyro_apd.diagnostics.comparison.verdict import (
    INDISTINGUISHABLE,
    METRICS,
    POORLY_MIXED,
    TOO_FEW,
    Row,
    judge,
    overall,
)


@pytest.mark.parametrize(
    ("name", "chain", "generator", "resolution", "status", "words"),
    [
        ("accuracy", 0.95, 0.949, 0.002, "indistinguishable", INDISTINGUISHABLE),
        ("accuracy", 0.95, 0.93, 0.002, "loses", "loses 0.02"),
        ("accuracy", 0.95, 0.97, 0.002, "departs", "departs by 0.02, to the better"),
        ("nll", 0.2, 0.21, 0.005, "loses", "loses 5.0%"),
        ("nll", 0.2, 0.1, 0.005, "departs", "departs by 50%, to the better"),
        ("mean_mi", 0.1, 0.05, 0.01, "loses", "loses 50%"),
        ("mean_mi", 0.1, 0.0, 0.01, "loses", "loses 100%"),
        ("mean_mi", 0.1, 0.13, 0.01, "loses", "overstates by 30%"),
        ("mean_mi[noise]", 0.1, 0.05, 0.01, "loses", "loses 50%"),
        ("mean_mi", 0.1, 0.05, 0.06, "unclear", TOO_FEW),
        ("auroc_mi[noise]", 0.9, 0.7, 0.3, "unclear", TOO_FEW),
        ("weight_sd_ratio_50", 1.0, 0.6, 0.1, "loses", "loses 0.4"),
        ("nll", 0.2, math.inf, 0.1, "loses", "loses: inf for the generator"),
        ("mi_correlation", math.nan, 0.5, 0.1, "unclear", "not defined for this chain"),
        ("mi_correlation", 0.9, math.nan, 0.1, "loses", "loses: nan for the generator"),
    ],
)
def test_words_for_a_figure(name, chain, generator, resolution, status, words):
    assert judge(name, chain, generator, resolution, poorly_mixed=False) == (status, words)


def test_a_poorly_mixed_chain_decides_nothing_but_says_what_it_sees():
    assert judge("mean_mi", 0.1, 0.1, 0.01, poorly_mixed=True) == ("unclear", POORLY_MIXED)
    status, words = judge("mean_mi", 0.1, 0.0, 0.01, poorly_mixed=True)
    assert status == "unclear"
    assert words == f"{POORLY_MIXED} (loses 100% against these draws)"


def row(name, chain, generator, resolution, group="function space", poorly_mixed=False):
    status, words = judge(name, chain, generator, resolution, poorly_mixed)
    label = METRICS[name.partition("[")[0]].label
    return Row(name, label, group, chain, generator, math.nan, resolution, status, words)


GOOD, BETTER = row("accuracy", 0.9, 0.9, 0.01), row("nll", 0.2, 0.1, 0.02)
LOST = row("mean_mi[noise]", 0.4, 0.1, 0.05, "out of distribution: noise")
WEIGHTS = row("weight_sd_ratio_50", 1.0, 0.5, 0.05, "weight space")


def test_overall_verdict():
    assert overall([GOOD], 0.0, True) == ("indistinguishable", f"{INDISTINGUISHABLE}, in 1 of 1 metrics.")
    assert overall([GOOD, LOST], 0.0, True) == ("loses", "mean MI on noise loses 75%.")
    assert overall([GOOD, BETTER], 0.0, True)[0] == "departs"
    assert overall([GOOD, BETTER, LOST], 0.0, True)[0] == "loses"


def test_worst_loss_is_named_first():
    small = row("accuracy", 0.9, 0.88, 0.015)
    verdict = overall([small, LOST, *[small] * 3], 0.0, True)[1]
    assert verdict.startswith("mean MI on noise loses 75%; accuracy loses 0.02; ")
    assert verdict.endswith("and 2 more.")


def test_weights_decide_only_where_nothing_else_is_known():
    assert overall([GOOD, WEIGHTS], 0.0, True)[0] == "indistinguishable"
    assert overall([WEIGHTS], math.nan, True)[0] == "loses"


def test_without_the_figure_where_collapse_shows_there_is_no_verdict():
    blind = row("disagreement", 0.1, 0.09, 0.08)
    status, words = overall([GOOD, blind], 0.0, True)
    assert status == "unclear"
    assert words.startswith(TOO_FEW)
    unresolved = row("auroc_mi[noise]", 0.9, 0.8, 0.3)
    assert overall([GOOD, unresolved], 0.0, True)[1].endswith("in 1 of 2 metrics; the others are not resolved.")


def test_bad_chains_come_before_everything():
    status, words = overall([GOOD, LOST], 0.7, True)
    assert status == "unclear"
    assert words.startswith(f"{POORLY_MIXED}: 70%")
    assert "differs in 1 of 2 metrics" in words
    assert overall([GOOD], 0.0, False) == ("unclear", f"{POORLY_MIXED}: its draws are all the same.")
