# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Integers come back from a code, by the nodes of a graph, and take few bytes."""

import numpy as np
import pytest

from pyro_apd.export import rice_code

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


def session(code, optimised=None):
    """Runs the nodes of a code."""
    constants, nodes = rice_code.nodes("v", code)
    output = onnx.helper.make_tensor_value_info("v", onnx.TensorProto.INT32, None)
    kept = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = onnx.helper.make_graph(nodes, "decode", [], [output], kept)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def decoded(code):
    return session(code).run(None, {})[0]


def like_a_generator(shape, scale=3.0):
    """Laplace numbers whose scales depend on first and last index, with rows that are nearly zero."""
    draws = np.random.default_rng(0)
    rows = scale * 2.0 ** draws.uniform(-8, 2, (shape[0], *[1] * (len(shape) - 1)))
    columns = 2.0 ** draws.uniform(-1, 1, shape[-1])
    return np.round(draws.laplace(size=shape) * rows * columns).clip(-30_000, 30_000).astype(np.int16)


CASES = {
    "mixed": like_a_generator((20, 12, 30)),
    "large": like_a_generator((4, 6, 10), 5000.0),
    "sparse": (np.random.default_rng(1).random((8, 9, 10)) < 0.01).astype(np.int16) * -7,
    "zero": np.zeros((3, 4, 5), np.int16),
    "extreme": np.array([[-32768, 32767], [0, -1]], np.int16),
    "bytes": np.random.default_rng(2).integers(-128, 128, (6, 7)).astype(np.int8),
    "one number": np.array([[[5]]], np.int16),
    "ones": np.ones((2, 3), np.int8),
}


@pytest.mark.parametrize("name", CASES)
def test_integers_come_back(name):
    found = decoded(rice_code.encode(CASES[name]))
    assert found.shape == CASES[name].shape
    np.testing.assert_array_equal(found, CASES[name])


def test_few_bytes_are_needed():
    values = like_a_generator((40, 20, 50))
    magnitudes = np.maximum(np.abs(values).mean((1, 2)), 1e-3)
    share = 1 / (1 + magnitudes)  # of zero, in a geometric distribution of that mean; and a sign
    entropy = (-(np.log2(share) + (1 - share) / share * np.log2(1 - share)) + (1 - share)).mean()
    code = rice_code.encode(values)
    assert 8 * code.num_bytes / values.size < 1.25 * entropy
    assert code.num_sparse > 0
    assert code.num_bytes < 0.4 * values.nbytes


def test_all_is_decoded_when_the_file_is_loaded(tmp_path):
    session(rice_code.encode(CASES["mixed"]), tmp_path / "optimised.onnx")
    assert not onnx.load(tmp_path / "optimised.onnx").graph.node


def test_the_same_integers_give_the_same_code():
    first, again = (rice_code.encode(CASES["mixed"]) for _ in range(2))
    assert first.quotients.tobytes() == again.quotients.tobytes()
    assert first.remainders.tobytes() == again.remainders.tobytes()
