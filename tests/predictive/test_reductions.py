# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Names of averages; what the averages are is in ``test_accumulators`` and, with a model, in ``test_predictive``."""

import pytest

from pyro_apd.predictive.reductions import check_names
from pyro_apd.uncertainty.accumulators import OF_PROBABILITIES


@pytest.mark.parametrize("names", [(), ("entropy",), ("mean_probability", "mean")])
def test_unknown_names(names):
    with pytest.raises(ValueError, match="`reduce` must name some of mean_probability"):
        check_names(names, OF_PROBABILITIES)
