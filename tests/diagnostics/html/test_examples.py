# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_apd.diagnostics.comparison.evaluation import Inputs
from pyro_apd.diagnostics.html.examples import examples


def inputs(x):
    return Inputs((x,), {}, None, None, {})


def classes(mi):
    mean_NK = torch.tensor([[0.1, 0.9]]).expand(len(mi), 2)
    return {"mi": torch.tensor(mi), "mean": mean_NK}


CHAIN = classes([0.3, 0.1, 0.2, 0.9, 0.5, 0.6, 0.7])
GENERATOR = classes([0.3, 0.1, 0.9, 0.9, 0.5, 0.6, 0.7])
PER_INPUT = {"chain": CHAIN, "generator": GENERATOR, "targets": {"y": torch.arange(7)}}


def test_rows_of_a_table_are_the_most_and_least_sure_and_those_that_differ():
    x = torch.arange(7.0).unsqueeze(1).expand(7, 12)
    rows, pictures = examples(PER_INPUT, inputs(x), None)
    assert pictures == []
    by_kind = {kind: [row.index for row in rows if row.kind == kind] for kind in ("most sure", "least sure")}
    assert by_kind["most sure"][:3] == [1, 2, 0]
    assert by_kind["least sure"][:3] == [3, 6, 5]
    (first,) = [row for row in rows if row.kind == "differ most"][:1]
    assert (first.index, first.chain, first.target, first.features) == (2, "1 (0.90)", "2", ["2"] * 8)


def test_long_rows_have_no_features():
    assert [row.features for row in examples(PER_INPUT, inputs(torch.ones(7, 33)), None)[0]] == [[]] * 15
    assert len(examples(PER_INPUT, inputs(torch.ones(7, 32)), None)[0][0].features) == 8


def test_numbers_have_a_standard_deviation():
    side = {"epistemic": torch.arange(7.0), "sd": torch.full((7,), 0.25), "mean": torch.full((7,), 12.5)}
    rows, _ = examples({"chain": side, "generator": side}, inputs(torch.ones(7, 3)), None)
    assert rows[0].generator == "12.5 ± 0.25"
    assert rows[0].target == ""


@pytest.mark.parametrize(
    ("shape", "image_shape"), [((7, 64), (8, 8)), ((7, 192), [3, 8, 8]), ((7, 1, 8, 8), None), ((7, 3, 8, 8), None)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8, torch.bool])
def test_images_are_drawn(shape, image_shape, dtype):
    rows, (picture,) = examples(PER_INPUT, inputs((3 * torch.rand(shape)).to(dtype)), image_shape)
    assert rows == []
    assert picture.light != picture.dark
    assert "disagree least" in picture.caption


def test_nothing_is_shown_of_what_is_neither_table_nor_image():
    for x in (torch.ones(7, 5, 4), torch.ones(6, 4), torch.ones(7), torch.ones(7, 2, 8, 8)):
        assert examples(PER_INPUT, inputs(x), None) == ([], [])
    assert examples({}, inputs(torch.ones(7, 4)), None) == ([], [])
    assert examples(PER_INPUT, None, None) == ([], [])


@pytest.mark.parametrize("image_shape", [(8, 9), (64,), (2, 2, 4, 4)])
def test_an_image_shape_that_does_not_fit_is_named(image_shape):
    with pytest.raises(ValueError, match=r"`image_shape` .* does not fit inputs of 64 numbers; give \(H, W\)"):
        examples(PER_INPUT, inputs(torch.ones(7, 64)), image_shape)
