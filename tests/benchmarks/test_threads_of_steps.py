# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pytest

from benchmarks.threads_of_steps import main


@pytest.mark.thorough
def test_it_runs(capsys):
    main(["--quick"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 64-50-10")]
    assert [row.split(" | ")[1] for row in rows] == ["quiet", "busy"]
    assert all(float(rate) > 0 for row in rows for rate in row.split(" | ")[2:5])
