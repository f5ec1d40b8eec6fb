# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Damaged and hostile files; ``python -m benchmarks.fuzz_files`` tries 20,000."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz_files


@pytest.mark.slow
def test_each_loads_right_or_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_files, "_LONG", (300, 3_000))
    counts, costs = fuzz_files.fuzz(80, 0, tmp_path, is_limited=False)
    assert sum(counts.values()) == 80
    assert {kind.split(":")[0] for kind in counts} == {*fuzz_files.MUTATIONS, "stored draws"}
    assert costs.seconds > 0


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(sorted(fuzz_files.MUTATIONS)),
    name=st.sampled_from(fuzz_files.SEEDS),
)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_of_each(tmp_path, seed, kind, name):
    original = (fuzz_files.FILES / f"{name}.safetensors").read_bytes()
    contents = fuzz_files.MUTATIONS[kind](original, random.Random(seed))
    assert fuzz_files.outcome(kind, contents, original, tmp_path / "case") in ("loaded", "refused")


def test_the_seal_is_right():
    """Otherwise every hostile header would be refused by its digest, and nothing behind it be tested."""
    contents = (fuzz_files.FILES / "posterior_v2_int8.safetensors").read_bytes()
    header, description, data = fuzz_files.split(contents)
    description["metadata"] = {"notes": "changed"}
    resealed = fuzz_files.sealed(header, description, data)
    assert resealed != contents
    assert len(data) > 32
