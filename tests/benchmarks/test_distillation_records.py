# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Stored results are merged: no run takes away what another has stored."""

import json
import re

import pytest

from benchmarks import distillation_records
from benchmarks.distillation_records import Records

CHAIN = {"accuracy": 0.9, "nll": 0.2, "mean_mi": 0.1}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "distillation_x.json"


def stored_in(path):
    return json.loads(path.read_text())


def test_a_run_of_some_methods_and_seeds_leaves_the_others(path):
    first = Records(path)
    for seed in (0, 1):
        first.add(seed, "held-out SGLD", CHAIN)
        first.add(seed, "SWAG, 4", {"nll": 0.3})
    before = stored_in(path)
    Records(path).add(1, "flow matching, 4", {"nll": 0.4})
    after = stored_in(path)
    assert after["0"] == before["0"]
    assert list(after["1"]) == ["held-out SGLD", "SWAG, 4", "flow matching, 4"]
    # Computed again: replaced in its place, and nothing else.
    Records(path).add(0, "SWAG, 4", {"nll": 0.5})
    assert stored_in(path)["1"] == after["1"]
    assert list(stored_in(path)["0"]) == list(before["0"])
    assert stored_in(path)["0"]["SWAG, 4"]["nll"] == 0.5


def test_two_runs_at_a_time_keep_what_both_have_found(path):
    one, other = Records(path), Records(path)
    one.add(0, "SWAG, 4", {"nll": 0.3})
    other.add(0, "flow matching, 4", {"nll": 0.4})
    one.add(2, "SWAG, 4", {"nll": 0.3})
    assert {seed: list(runs) for seed, runs in stored_in(path).items()} == {
        "0": ["SWAG, 4", "flow matching, 4"],
        "2": ["SWAG, 4"],
    }
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_each_result_has_its_date_and_commit(path):
    Records(path).add(0, "SWAG, 4", {"nll": 0.3})
    entry = stored_in(path)["0"]["SWAG, 4"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry["date"])
    assert re.fullmatch(r"([0-9a-f]{7,}\+?)?", entry["commit"])


def test_outside_of_a_repository_there_is_no_commit(path, monkeypatch, tmp_path):
    monkeypatch.setattr(distillation_records, "__file__", str(tmp_path / "records.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    Records(path).add(0, "SWAG, 4", {"nll": 0.3})
    assert stored_in(path)["0"]["SWAG, 4"]["commit"] == ""


def test_results_of_two_chains_are_not_mixed(path):
    Records(path).add(0, "held-out SGLD", CHAIN)
    # The same chain on a machine that rounds differently; a label may flip.
    Records(path).add(0, "held-out SGLD", {"accuracy": 0.89, "nll": 0.20001, "mean_mi": 0.1})
    assert stored_in(path)["0"]["held-out SGLD"]["nll"] == 0.2
    with pytest.raises(ValueError, match=r"seed 0 .* another chain: mean_mi of 'held-out SGLD' is 0\.1 .* 0\.11 "):
        Records(path).add(0, "held-out SGLD", {**CHAIN, "mean_mi": 0.11})


def test_without_a_file_results_are_kept_in_memory():
    records = Records(None)
    records.add(3, "SWAG, 4", {"nll": 0.3})
    assert records.of(3)["SWAG, 4"]["nll"] == 0.3
    assert list(records.by_seed) == ["3"]
