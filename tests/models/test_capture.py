# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A graph is used only if no Python code of the model depends on the values of its data."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_apd.models.building import build_potential

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
CODES = (torch.arange(8) == 5).long()
COLUMNS = torch.tensor([True, False, True])


def path_of(mean, **settings):
    def model(x, codes, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(mean(x, codes, w), 1.0), obs=y)

    potential, start = build_potential(model, (X, CODES, X[:, 0]), {}, **settings)
    potential.gradient(potential.layout.unconstrain(start), potential.source.draw())
    return potential.path


def where_there_are_rows(x, codes, w):
    f = x @ w
    return torch.where(codes == 1, 3 * f, f) if x[codes == 1].shape[0] else f


def nothing(value):
    """Zero, after Python has read a number."""
    return 0.0 * value


READING = {
    "shape of selected rows": where_there_are_rows,
    "tolist": lambda x, codes, w: x @ w + nothing(sum(codes.tolist())),
    "text": lambda x, codes, w: x @ w + nothing(len(str(codes))),
    "item": lambda x, codes, w: x @ w + nothing(codes.sum().item()),
    "unique": lambda x, codes, w: x @ w + nothing(len(torch.unique(codes))),
    "nonzero": lambda x, codes, w: x @ w + nothing(len(codes.nonzero())),
    "masked_select": lambda x, codes, w: x @ w + nothing(len(x[:, 0].masked_select(codes == 1))),
}
FIXED = {
    "rows by number": lambda x, codes, w: x @ w + w[codes],
    "where": lambda x, codes, w: torch.where(codes == 1, x @ w, 0.0),
    "values set by a mask": lambda x, codes, w: (x @ w).clone().masked_fill(codes == 1, 0.0),
    "a constant mask": lambda x, codes, w: x[:, COLUMNS] @ w[COLUMNS],
}


@pytest.mark.parametrize("case", READING)
def test_code_that_reads_values_is_traced(case):
    assert path_of(READING[case], batch_size=4) == "traced"


@pytest.mark.parametrize("case", FIXED)
def test_code_that_reads_none_is_captured(case):
    assert path_of(FIXED[case], batch_size=4) == "captured"


def test_shapes_that_follow_from_all_data_are_constants():
    assert path_of(where_there_are_rows) == "captured"
