# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Probe inputs and the arguments that have rows."""

import pytest
import torch

from pyro_apd.distillation.probes import Probes, RowArguments


def test_rows_replace_arguments_of_a_datum_each():
    seen = {}

    def model(x, offset, y=None, *, z):
        seen.update(x=x, offset=offset, y=y, z=z)

    x, y, offset = torch.randn(6, 2), torch.arange(6), torch.zeros(3)
    rows = RowArguments(model, (x, offset), {"y": y, "z": 5.0})
    assert [value.shape for value in rows.rows] == [(6, 2), (6,)]
    rows(x[:2], y[:2])
    assert seen["x"].shape == (2, 2)
    assert seen["offset"] is offset
    assert seen["y"].tolist() == [0, 1]
    assert seen["z"] == 5.0


@pytest.mark.parametrize("args", [(), (3.0,), (torch.tensor(1.0),), (torch.zeros(0, 2),)])
def test_arguments_without_rows(args):
    with pytest.raises(ValueError, match="rows"):
        RowArguments(lambda *args: None, args, {})


def test_probes_are_mixtures_perturbed_rows_and_noise():
    rows = torch.zeros(50, 4)
    rows[:, 0] = 1.0
    rows[0] = torch.tensor([1.0, 1.0, 0.0, 0.0])
    (probes,) = Probes([rows]).draw(400)
    assert probes.shape == (400, 4)
    mixtures, perturbed, as_they_are, noise = probes[:100], probes[100:240], probes[240:320], probes[320:]
    assert (as_they_are.unsqueeze(1) == rows).all(-1).any(-1).all()
    assert torch.isin(mixtures[:, 0], torch.tensor(1.0)).all()
    assert not mixtures[:, 2:].any()
    assert 0 < (perturbed - rows[1]).std() < rows.std()
    assert noise.min() >= 0
    assert noise.max() <= 1
    assert noise.mean().item() == pytest.approx(0.5, abs=0.05)


def test_constant_pixels_vary_in_noise_too():
    images = torch.rand(100, 16).round()
    images[:, 0] = 0.0
    (probes,) = Probes([images]).draw(400)
    assert probes[320:, 0].std() > 0.2


def test_columns_with_units_of_their_own_keep_their_range():
    table = torch.rand(200, 3) * torch.tensor([1.0, 100.0, 1e6])
    (probes,) = Probes([table]).draw(400)
    assert probes[320:, 0].max() <= 1.0
    assert probes[:, 0].abs().max() < 5.0
    assert probes[320:, 2].max() > 5e5


def test_integers_are_only_ever_rows():
    tokens = torch.arange(10) * 7
    _, picked = Probes([torch.randn(10, 2), tokens]).draw(30)
    assert torch.isin(picked, tokens).all()
    assert picked.dtype == tokens.dtype


def test_probes_as_they_are():
    rows = torch.randn(10, 2)
    (picked,) = Probes([rows], unchanged=True).draw(30)
    assert (picked[:, None] == rows).all(-1).any(1).all()
    assert rows.shape == (10, 2)


def test_drawing_leaves_the_data_alone():
    rows = torch.randn(20, 3)
    before = rows.clone()
    Probes([rows]).draw(40)
    assert torch.equal(rows, before)
