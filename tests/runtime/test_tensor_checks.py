# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch

from pyro_apd.runtime.tensor_checks import check_inputs, checked_labels, checked_probabilities, shape_of

PROBS = torch.softmax(torch.arange(24.0).reshape(2, 4, 3) % 5, -1)
LABELS = torch.tensor([0, 2, 1, 2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_keep_their_digits_or_get_those_of_single_precision(dtype):
    found = checked_probabilities("probs_SNK", PROBS.to(dtype))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(found, PROBS.to(dtype).to(found.dtype))


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        (PROBS[0], r"shape \(draws, data, classes\) .* got \(4, 3\). For a single draw pass probs.unsqueeze"),
        (PROBS[:0], "at least one draw"),
        (PROBS[..., :0], "one class"),
        (PROBS * torch.nan, "24 NaN"),
        (PROBS * torch.inf, "sum to one"),
        (-PROBS, "negative entries, the least"),
        (2 * PROBS, "a sum of 2 was found"),
        (PROBS.long(), "got shape .* of torch.int64"),
        (PROBS.cfloat(), "complex64"),
        (PROBS.to_sparse(), "sparse"),
        (PROBS.numpy(), "got ndarray"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_probabilities(probs, message):
    with pytest.raises(ValueError, match=rf"^probs_SNK .*{message}"):
        checked_probabilities("probs_SNK", probs)


def test_no_data_are_probabilities_of_nothing():
    assert checked_probabilities("probs_SNK", PROBS[:, :0]).shape == (2, 0, 3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64])
def test_labels_of_any_dtype_are_indices(dtype):
    found = checked_labels("`y`", LABELS.to(dtype), 4, 3)
    assert found.dtype == torch.int64
    assert torch.equal(found, LABELS)
    assert checked_labels("`y`", torch.tensor([True, False]), 2, 2).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:3], r"one for each of 4 data, \(4,\); got shape \(3,\)"),
        (LABELS.unsqueeze(1), r"got shape \(4, 1\)"),
        (LABELS + 1, "from 0 to 2; got 3 in row 1, and values from 1 to 3"),
        (LABELS - 1, "got -1 in row 0"),
        (LABELS + 0.5, "got 0.5 in row 0"),
        (torch.tensor([0.0, torch.nan, 1.0, 2.0]), "got nan in row 1"),
        (LABELS.cfloat(), "complex64"),
        (LABELS.to_sparse(), "sparse"),
        (LABELS.numpy(), "got ndarray"),
    ],
)
def test_what_is_no_labels(labels, message):
    with pytest.raises(ValueError, match=rf"^`y` must be .*{message}"):
        checked_labels("`y`", labels, 4, 3)


def test_the_number_of_classes_need_not_be_known():
    assert checked_labels("`y`", LABELS + 100, 4).tolist() == [100, 102, 101, 102]
    with pytest.raises(ValueError, match="from 0 to K - 1; got -1"):
        checked_labels("`y`", LABELS - 1, 4)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([[1.0, 2.0], [3.0, torch.nan]]), "NaN or infinity in 1 of 2 rows, the first row 1;"),
        (torch.tensor([torch.inf, 1.0]), "in 1 of 2 rows, the first row 0;"),
        (torch.zeros(0, 2), r"at least one row; got shape \(0, 2\)"),
        (torch.zeros(2, 0), r"got shape \(2, 0\)"),
        (torch.tensor(1.0), r"got shape \(\)"),
        (torch.zeros(2, dtype=torch.long), "floating-point tensor .* torch.int64"),
        (torch.eye(2).to_sparse(), "sparse"),
        (np.zeros(2), "got ndarray"),
    ],
)
def test_what_is_no_inputs(x, message):
    with pytest.raises(ValueError, match=rf"^`x` .*{message}"):
        check_inputs("`x`", x)


def test_whole_numbers_are_inputs_where_that_is_said():
    check_inputs("`x`", torch.zeros(2, dtype=torch.long), is_real=False)
    check_inputs("`x`", torch.zeros(2, 3, requires_grad=True))
    assert shape_of(torch.zeros(2)) == "shape (2,) of torch.float32"
