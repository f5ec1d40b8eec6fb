# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What ``benchmarks.which_sampler`` measures of a run, on a posterior that is known."""

import warnings

import pytest

from benchmarks import which_sampler


@pytest.mark.slow
def test_a_run_on_collinear_predictors():
    task = which_sampler.collinear_task()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entry = which_sampler.run(task, "SGHMC", None, share=0.1)
    assert entry["ess"] > 100
    assert entry["measured"]["sd over exact, furthest"] == pytest.approx(1.0, abs=0.3)
    assert entry["step_size"] > 0
    cells = which_sampler.cells(entry | {"warnings": ["WarmupWarning: too short"]})
    assert cells[:2] == ["SGHMC", "all"]
    assert cells[5] == "WarmupWarning"
    assert len(cells) == len(which_sampler.HEADER) + 1
