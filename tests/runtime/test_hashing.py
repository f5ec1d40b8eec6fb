# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import hashlib
import json

import numpy as np
import pytest
import torch

from pyro_apd import fingerprint


def test_what_is_hashed():
    x = torch.tensor([1.0, 2.0])
    expected = hashlib.sha256(b"float32 [2]\n" + x.numpy().tobytes()).hexdigest()
    assert fingerprint(x) == {"sha256": expected, "tensors": [{"dtype": "float32", "shape": [2]}]}
    assert json.loads(json.dumps(fingerprint(x))) == fingerprint(x)


def test_same_numbers_same_name():
    x = torch.arange(12.0).reshape(3, 4)
    assert fingerprint(x.T.contiguous().T) == fingerprint(x) == fingerprint(x.numpy())
    others = [fingerprint(v)["sha256"] for v in (x, x.T, x.double(), x.reshape(4, 3), x + 1, torch.zeros(0))]
    assert len(set(others)) == len(others)
    assert fingerprint(x, x[0])["sha256"] != fingerprint(x[0], x)["sha256"]
    mixed = fingerprint(np.array([True, False]), 3, torch.ones(2, dtype=torch.bfloat16))
    assert mixed["tensors"][2]["dtype"] == "bfloat16"


@pytest.mark.parametrize("data", [(), (None,), ("x",), (object(),)])
def test_what_has_no_fingerprint(data):
    with pytest.raises(ValueError, match=r"fingerprint|Data must be"):
        fingerprint(*data)
