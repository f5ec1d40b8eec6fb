# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The benchmark of noise runs."""

import torch

from benchmarks import noise


def test_it_runs(capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(noise, "NETWORKS", {"4-3-2": (4, 3, 2)})
    assert noise.main(["--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| network | normal, raw | normal, update | three-point, raw | three-point, update | normal_ |"
    assert len(lines) == 3
    assert lines[2].startswith("| 4-3-2 | ")
