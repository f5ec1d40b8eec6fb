# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""How a learning rate changes over the steps of an optimisation."""

import pytest

from pyro_apd.runtime.rates import share_of_rate


def test_learning_rate_rises_then_falls_to_zero():
    shares = [share_of_rate(i / 1000) for i in range(1001)]
    assert shares[0] == 0.0
    assert max(shares) == pytest.approx(1.0, abs=1e-3)
    assert shares.index(max(shares)) == 50
    assert shares[-1] == pytest.approx(0.0, abs=1e-9)
