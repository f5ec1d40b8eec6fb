# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Tensors of a file are decoded to what the posterior's own file holds."""

import pytest
import torch

from pyro_apd.export.stored_tensors import StoredTensors
from pyro_apd.generators import precision

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

TENSORS = {
    "weights": torch.randn(64, 40),
    "step": torch.tensor(0.3),
    "large": (3 * torch.randn(4, 30, 50)).to(torch.int16),
    "small": (3 * torch.randn(4, 5)).to(torch.int16),
    "wide": torch.tensor([[1000, 2]], dtype=torch.int16),
    "years": torch.tensor([2026], dtype=torch.int32),
}


@pytest.mark.parametrize("dtype", ["float32", "int8", "bfloat16"])
def test_tensors_come_back(dtype):
    stored = StoredTensors(is_compact=True)
    stored.add(TENSORS, dtype)
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in stored.initializers]
    outputs = []
    for name, value in TENSORS.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(value.numpy().dtype)
        stored.nodes.append(onnx.helper.make_node("Identity", [name], [f"out/{name}"]))
        outputs.append(onnx.helper.make_tensor_value_info(f"out/{name}", kind, None))
    graph = onnx.helper.make_graph(stored.nodes, "decode", [], outputs, constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    found = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {})
    expected = precision.decode(precision.encode(TENSORS, dtype), dtype)
    for (name, value), one in zip(TENSORS.items(), found, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), expected[name].to(value.dtype), rtol=0, atol=0)
    kept = {name: value.nbytes for name, value in stored.initializers}
    assert sum(size for name, size in kept.items() if name.startswith("large/")) < 0.55 * 2 * TENSORS["large"].numel()
    assert kept["small/stored"] == 20
    assert (kept.get("weights/stored") == 64 * 40) == (dtype == "int8")
