# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""One posterior that several threads serve; ``python -m benchmarks.threads`` does so for a minute."""

import pytest
import torch

from benchmarks.threads import REQUESTS, Service, serve, table


@pytest.mark.slow
def test_answers_in_eight_threads_are_those_of_one():
    before = torch.get_rng_state()
    service = Service(8, sizes=(5, 6, 3))
    found = serve(service, 8, lambda count: count == 40)
    assert found["answers"] == dict.fromkeys(REQUESTS, 80)
    assert sum(found["wrong"].values()) == 0
    assert found["errors"] == []
    assert not found["handlers_left"]
    assert not torch.equal(torch.get_rng_state(), before)  # by the draws without a seed
    assert "| 8 |" in table([{**found, "growth_mb": 0.0, "memory_mb": 1.0}])
