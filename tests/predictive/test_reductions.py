# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Names of averages; what the averages are is in ``test_accumulators`` and, with a model, in ``test_predictive``."""

import pytest
import torch

from pyro_apd.predictive.reductions import check_names, reduce_outputs
from pyro_apd.uncertainty.accumulators import OF_PROBABILITIES


@pytest.mark.parametrize("names", [(), ("entropy",), ("mean_probability", "mean")])
def test_unknown_names(names):
    with pytest.raises(ValueError, match="`reduce` must name some of mean_probability"):
        check_names(names, OF_PROBABILITIES)


@pytest.mark.parametrize(
    ("names", "expected"), [("entropy", "must name some of"), ([], "must name some"), (3, "got 3")]
)
def test_an_error_names_the_argument_that_was_given(names, expected):
    with pytest.raises(ValueError, match=rf"`names` .*{expected}"):
        reduce_outputs(lambda x: x, {}, torch.ones(1), names=names)
