# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The benchmark of sampling speed runs, and its contestants on PyTorch take SGLD steps."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]


def test_it_runs():
    command = [sys.executable, "-m", "benchmarks.sampling", "--quick", "--threads", "1", "--compile", "false"]
    command += ["--work", "64-50-10", "--only", "a,e,f16,floor"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "stopped" not in done.stdout + done.stderr
    for contestant in ("(a)", "(e)", "(f)"):
        row = re.search(rf"^\| {re.escape(contestant)}.*$", done.stdout, re.MULTILINE)
        drift, noise = map(float, row[0].strip("| ").split(" | ")[-1].split(", "))
        assert drift < 1e-5
        assert 0.9 < noise < 1.1
    assert "driver adds" in done.stdout
