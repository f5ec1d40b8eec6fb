# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What ``benchmarks.posteriordb --auto`` counts, on entries and on one short run without the data folder."""

import warnings

import pytest
import torch

from benchmarks import common, posteriordb, posteriordb_auto
from pyro_apd import WarmupWarning

ENTRY = {"posterior": "kidiq", "kernel": "SGLD", "seed": 0, "seconds": 3.0, "warnings": [], "misses": False}
MEASURED = {"step_size": 0.01, "ess": 900.0, "mean_error": 0.03, "sd_ratio": 1.02}


def test_misses_without_a_warning_are_counted():
    entries = [
        ENTRY | MEASURED,
        ENTRY | MEASURED | {"misses": True, "seed": 1},
        ENTRY | MEASURED | {"misses": True, "warnings": ["WarmupWarning: too short"]},
    ]
    text = posteriordb_auto.summary(entries)
    assert text.startswith("3 runs; 2 miss, 1 of them without a warning; 1 warned.")
    assert text.endswith("Without a warning: kidiq SGLD seed 1.")
    assert posteriordb_auto.summary(entries[:1]).endswith("0 warned.")


def test_rows_of_the_table():
    row = posteriordb_auto.cells(ENTRY | MEASURED)
    assert row == ["kidiq", "SGLD", "0.01", "3", "900", "0.030", "1.020", "nothing"]
    assert len(row) == len(posteriordb_auto.HEADER)
    lost = posteriordb_auto.cells(ENTRY | {"misses": True, "warnings": ["diverged"]})
    assert lost == ["kidiq", "SGLD", "diverged", "3", "diverged", "diverged", "diverged", "warned, misses"]


def test_runs_that_are_done_are_not_repeated(monkeypatch):
    monkeypatch.setattr(posteriordb_auto, "run", lambda *case: case)
    found = list(posteriordb_auto.benchmark(["kidiq", "arK"], ["SGLD"], [0, 1], [ENTRY]))
    assert found == [("kidiq", "SGLD", 1), ("arK", "SGLD", 0), ("arK", "SGLD", 1)]


def test_a_resumed_benchmark_keeps_each_run_as_it_ends(monkeypatch, tmp_path, capsys):
    def run(name, kernel, seed):
        if seed == 2:
            raise KeyboardInterrupt
        return ENTRY | MEASURED | {"posterior": name, "kernel": kernel, "seed": seed}

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(posteriordb_auto, "run", run)
    command = ["posteriordb", "--auto", "--resume", "--only", "kidiq", "--kernels", "SGLD"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(KeyboardInterrupt):
        posteriordb.main()
    assert [entry["seed"] for entry in common.read_json("posteriordb_auto")] == [0, 1]
    monkeypatch.setattr(posteriordb_auto, "run", lambda *case: ENTRY | MEASURED | {"seed": case[2], "step_size": 0.5})
    capsys.readouterr()
    posteriordb.main()
    assert [entry["step_size"] for entry in common.read_json("posteriordb_auto")] == [0.01, 0.01, 0.5]
    assert "3 runs; 0 miss" in capsys.readouterr().out


def test_effective_draws_are_of_all_chains_together():
    draws = torch.randn(4, 250, generator=torch.Generator().manual_seed(0))
    draws[0] += 10  # one chain is elsewhere
    gold = {"a": torch.randn(10, 1000)}
    assert posteriordb.compare({"a": draws.flatten()}, gold, 4)["a"]["ess"] < 10
    assert posteriordb.compare({"a": draws[1:].flatten()}, gold, 3)["a"]["ess"] > 300


@pytest.mark.slow
def test_a_run_far_from_its_reference_misses(monkeypatch):
    monkeypatch.setattr(posteriordb_auto, "data_folder", lambda: None)
    monkeypatch.setattr(posteriordb_auto, "NUM_DRAWS", 20)
    monkeypatch.setattr(posteriordb_auto, "NUM_WARMUP", 5)
    monkeypatch.setattr(posteriordb_auto, "THINNING", 5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    y = x.sum(1) + torch.randn(60, generator=generator, dtype=torch.float64)
    gold = {name: torch.randn(10, 1000).double() + 100 for name in ("beta[1]", "beta[2]", "sigma")}
    monkeypatch.setattr(posteriordb_auto, "arguments", lambda folder, posterior: (x, y))
    monkeypatch.setattr(posteriordb_auto, "reference", lambda folder, posterior: gold)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", WarmupWarning)
        entry = posteriordb_auto.run("sblrc", "PSGLD", 0)
    assert entry["misses"]
    assert entry["mean_error"] > 50
    assert entry["step_size"] > 0
    assert set(entry["parameters"]) == set(gold)
