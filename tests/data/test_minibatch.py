# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_apd.data.minibatch import RowSubsample

X, Y = torch.arange(20.0).reshape(10, 2), torch.arange(10)


def started(source, seed=0):
    source.start(torch.Generator().manual_seed(seed))
    return source


def test_row_subsample_slices_every_tensor_with_n_rows_and_only_those():
    prior = torch.ones(3)
    source = started(RowSubsample((X, {"nested": Y}, prior, "name"), {"w": Y.float()}, 4))
    (rows,) = source.draw()
    call = source.bind((rows,))
    assert torch.equal(call.args[0], X[rows])
    assert torch.equal(call.args[1]["nested"], Y[rows])
    assert call.args[2] is prior
    assert call.args[3] == "name"
    assert torch.equal(call.kwargs["w"], Y[rows].float())
    assert source.scale((rows,)) == 2.5


def test_row_subsample_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="batch_size=11 is more than the 10 rows"):
        RowSubsample((X, Y), {}, 11)
    with pytest.raises(ValueError, match="none of the arguments is a tensor"):
        RowSubsample((3,), {}, 2)
    with pytest.raises(ValueError, match="num_data=7"):
        RowSubsample((X, Y), {}, 2, num_data=7)
