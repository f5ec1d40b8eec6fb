# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A row's likelihood must not depend on the rows that it is collated with."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from pyro_apd.errors import ModelError
from pyro_apd.models.building import build_potential

LENGTHS = [2, 5, 3, 7, 4, 2, 6, 3, 5, 4, 3, 2]
SEQUENCES = [(torch.linspace(-1.0, 1.0, length), torch.tensor(float(length % 3))) for length in LENGTHS]
EQUAL = [(torch.linspace(-1.0, 1.0, 4) * i, torch.tensor(float(i % 3))) for i in range(12)]


def padded(items):
    x, y = zip(*items, strict=True)
    lengths = torch.tensor([len(row) for row in x])
    return pad_sequence(list(x), batch_first=True), torch.stack(y), lengths


def centred(items):
    x, y, lengths = padded(items)
    return x - x.mean(0), y, lengths


def jittered(items):
    x, y, lengths = padded(items)
    return x + 0.01 * torch.randn(len(x), 1), y, lengths


def model(pooled):
    def sequences(x, y, lengths):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(w + pooled(torch.exp(w * x), lengths), 1.0), obs=y)

    return sequences


def masked_mean(x, lengths):
    is_inside = torch.arange(x.shape[1]) < lengths[:, None]
    return (x * is_inside).sum(1) / lengths


def plain_mean(x, lengths):
    return x.mean(1)


def built(collate, pooled, items, **settings):
    loader = DataLoader(items, 4, collate_fn=collate, **settings)
    return build_potential(model(pooled), (loader,), {}, seed=0)[0]


@pytest.mark.parametrize(
    ("collate", "items"), [(padded, SEQUENCES), (padded, EQUAL[:8] + SEQUENCES[:4]), (centred, EQUAL)]
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_collation_that_couples_rows_is_refused(collate, items, shuffle):
    with pytest.raises(ModelError, match="'y'"):
        built(collate, plain_mean, items, shuffle=shuffle)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    ("collate", "pooled", "items"),
    [(padded, masked_mean, SEQUENCES), (padded, plain_mean, EQUAL), (jittered, plain_mean, EQUAL)],
)
def test_collation_that_leaves_rows_alone_goes_on(collate, pooled, items, shuffle):
    potential = built(collate, pooled, items, shuffle=shuffle)
    w = torch.tensor([0.3])
    over_epoch = sum(weight * potential.gradient(w, batch)[0] for batch, weight in potential.source.cover())
    exact = w.clone().requires_grad_()
    x, y, lengths = collate(items)
    (exact.square() / 2 + (y - exact - pooled(torch.exp(exact * x), lengths)).square().sum() / 2).sum().backward()
    # Random shifts of rows by a hundredth move the gradient a little.
    torch.testing.assert_close(over_epoch, exact.grad, atol=1e-4, rtol=0.02 if collate is jittered else 1e-4)
