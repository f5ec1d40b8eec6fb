# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The sums on paper: some by hand, and that the page shows what the module prints."""

from pathlib import Path

import pytest

from benchmarks.billion import TABLES, Machine, Work, main, step_seconds

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()


@pytest.mark.parametrize("title", TABLES)
def test_the_page_has_the_table(title):
    assert TABLES[title]() in PAGE, f"docs/scaling.md: put in the table of `python -m benchmarks.billion`, {title}"


def test_sums_by_hand():
    machine, work = Machine(bandwidth_share=1.0, compute_share=1.0), Work()
    # Within a node 7/8 of 8 GB there and back at 450 GB/s; then 7/8 of a GPU's 1 GB between nodes at 50 GB/s.
    assert machine.all_reduce(8e9, 8) == pytest.approx(2 * 7 / 450)
    assert machine.all_reduce(8e9, 64) == pytest.approx(2 * 7 / 450 + 2 * 7 / 8 / 50)
    assert machine.compute(67e12, 1, machine.fp32) == pytest.approx(1.0)
    assert work.operations(1) == pytest.approx(6e9 * 257)
    assert work.warmup == pytest.approx(6 / 1408 / 4e-8)
    assert sum(step_seconds(8)) == pytest.approx(0.51, abs=0.005)


def test_it_prints(capsys):
    main()
    assert "106,534 steps, 85 epochs" in capsys.readouterr().out
    assert "106,534 steps, 85 epochs" in " ".join(PAGE.split())
