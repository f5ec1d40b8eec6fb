# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The questions to a GPU are asked, on whatever device there is."""

import pytest
import torch

from benchmarks import gpu


@pytest.mark.slow
def test_it_runs_on_a_cpu(capsys):
    assert gpu.main(["--quick", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "failed" not in printed
    for row in ("eager loop, 1 chain", "captured, 1 chain", "captured, 3 chains", "distil and predict"):
        assert row in printed.split("| --- |")[-1]


def test_a_part_that_fails_is_a_row(capsys):
    results = []
    gpu.attempted(results, "this", lambda: {"value": 1 / 0})
    gpu.attempted(results, "that", lambda: {"value": 2.0, "unit": "s"})
    assert gpu.table(results).splitlines()[2:] == [
        "| this | failed | ZeroDivisionError: division by zero |",
        "| that | 2 s |  |",
    ]


def test_steps_that_were_not_compiled_are_not_measured_as_such(monkeypatch):
    bench = gpu.Bench(torch.device("cpu"), is_quick=True)
    monkeypatch.setitem(gpu.PATHS, "compiled", {"compile": False})
    with pytest.raises(RuntimeError, match="steps are captured, not compiled"):
        bench.advancing(1, "compiled")


def test_waiting_is_refused_and_allowed_again(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with pytest.raises(KeyboardInterrupt), gpu.refusing_to_wait(True):
        raise KeyboardInterrupt
    with gpu.refusing_to_wait(False):
        pass
    assert modes == ["error", 1]


def test_graphs_are_replayed_only_where_asked_for():
    bench = gpu.Bench(torch.device("cpu"), is_quick=True)
    assert not bench.kernel().cuda_graphs
    assert not bench.kernel(**gpu.PATHS["compiled"]).cuda_graphs
    assert bench.kernel(**gpu.PATHS["CUDA graphs"]).cuda_graphs
