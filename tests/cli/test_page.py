# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The command that writes a page."""

import numpy as np
import pytest
import torch

from pyro_apd.cli.main import main
from pyro_apd.cli.page import load_arrays, page_inputs
from tests.support.exported import mlp, subspace_posterior


def network():
    """What --model names."""
    return mlp()


@pytest.mark.thorough
def test_a_page_from_files(tmp_path, capsys):
    pytest.importorskip("onnxscript")
    posterior, _ = subspace_posterior()
    posterior.save(tmp_path / "p.safetensors")
    names = {"feature_names": ["a", "b", "c", "d"], "class_names": ["x", "y", "z"], "y": [2, 0, 1]}
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(3, 4)), **names)
    command = ["page", str(tmp_path / "p.safetensors"), "--model", "tests.cli.test_page:network", "--link", "softmax"]
    command += ["--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / "site"), "--num-draws", "3"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'site' / 'index.html'}\n"
    text = (tmp_path / "site" / "index.html").read_text()
    assert '"label": "2"' in text
    assert '"classes": ["x", "y", "z"]' in text


def test_inputs_are_those_of_data_or_network():
    assert page_inputs(mlp(), {}, None).shape == (4,)
    assert page_inputs(mlp(), {}, "2x2").image == (2, 2)
    inputs = page_inputs(mlp(), {"x": np.zeros((20, 4)) + np.arange(4), "y": np.arange(20)}, "2x2")
    assert [example["label"] for example in inputs.examples] == [str(i) for i in range(10)]
    with pytest.raises(ValueError, match="--image must be ROWSxCOLUMNS"):
        page_inputs(mlp(), {}, "8")


def test_data_that_are_no_table(tmp_path):
    np.savez(tmp_path / "y.npz", y=np.zeros(3))
    with pytest.raises(ValueError, match=r"holds \['y'\]; it must hold the inputs as x"):
        load_arrays(tmp_path / "y.npz")
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(ValueError, match=r"not an \.npz file"):
        load_arrays(tmp_path / "text.npz")


def test_a_model_that_is_no_network(tmp_path, capsys):
    posterior, _ = subspace_posterior()
    posterior.save(tmp_path / "p.safetensors")
    assert main(["page", str(tmp_path / "p.safetensors"), "--model", "tests.cli.test_page:torch.zeros_like"]) == 2
    assert "must be an apd.BNN or a torch network" in capsys.readouterr().err
    assert torch.zeros_like
