# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What a page lets a person change."""

import pytest
import torch

from pyro_apd.page import PageInputs


def test_sliders_cover_the_data():
    x = torch.tensor([[1.0, 0.25], [3.0, 0.75], [9.0, 0.5]])
    inputs = PageInputs.sliders((2,), x, ["age", "share"], ["first", "second"])
    age, share = inputs.features
    assert age == {"name": "age", "low": 1.0, "high": 9.0, "step": 1.0}
    assert (share["low"], share["high"]) == (0.25, 0.75)
    assert share["step"] == pytest.approx(0.0025)
    assert inputs.start == [3.0, 0.5]
    assert inputs.examples == [{"label": "first", "values": [1.0, 0.25]}, {"label": "second", "values": [3.0, 0.75]}]


def test_sliders_without_data_and_of_constants():
    assert PageInputs.sliders((2,)).features[1] == {"name": "x1", "low": -3.0, "high": 3.0, "step": 0.03}
    constant = PageInputs.sliders((1,), torch.full((3, 1), 5.0))
    assert constant.features[0]["low"] < 5.0 < constant.features[0]["high"]
    assert constant.start == [5.0]


def test_a_drawing_has_the_range_of_the_data():
    x = torch.linspace(-1, 2, 12).reshape(2, 1, 2, 3)
    inputs = PageInputs.drawing((1, 2, 3), (2, 3), x, ["a"])
    assert inputs.limits == (-1.0, 2.0)
    assert inputs.start == [-1.0] * 6
    assert [example["label"] for example in inputs.examples] == ["a"]
    assert inputs.to_json()["shape"] == [1, 2, 3]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="64 cells, and a row of the inputs has shape \\(3,\\)"):
        PageInputs.drawing((3,), (8, 8))
    with pytest.raises(ValueError, match="no range"):
        PageInputs.drawing((4,), (2, 2), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="too many for sliders"):
        PageInputs.sliders((784,))
    with pytest.raises(ValueError, match="1 names"):
        PageInputs.sliders((2,), names=["a"])
