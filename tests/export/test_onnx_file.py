# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Files of ONNX, run by onnxruntime, give what the posterior gives."""

import sys

import pytest
import torch
from torch import nn

import pyro_apd as apd
from pyro_apd.export import checking, fixed_latents, stored_tensors
from pyro_apd.export.example import network_inputs
from tests.support.exported import low_rank_posterior, mlp, subspace_posterior

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

SCORES = ("mean", "mutual_information", "predictive_entropy", "networks")


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.out = kind(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.out = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.encoder(x).mean(1))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen, self.out = nn.Linear(4, 5).requires_grad_(False), nn.Linear(7, 3)

    def forward(self, x, z):
        return self.out(torch.cat([self.frozen(x), z], -1))


def run(path, **inputs):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return {output.name: torch.as_tensor(value) for output, value in zip(session.get_outputs(), found, strict=True)}


def assert_scores(found, probs_SNK):
    expected = {
        "mean": probs_SNK.mean(0),
        "mutual_information": apd.uncertainty.mutual_information(probs_SNK),
        "predictive_entropy": apd.uncertainty.predictive_entropy(probs_SNK),
        "networks": probs_SNK,
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0)


@pytest.fixture(scope="module", params=[(), (1, 1)], ids=["plain", "offset and scales"])
def fixed(request, tmp_path_factory):
    """A posterior, its model, and a file of 12 networks."""
    posterior, bnn = subspace_posterior(options=request.param)
    path = tmp_path_factory.mktemp("onnx") / "fixed.onnx"
    posterior.export_onnx(path, net=bnn, outputs=SCORES, num_draws=12, seed=3)
    return posterior, bnn, path


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [1, 2, 9])
def test_fixed_networks_are_those_of_the_fixed_latents(fixed, num_rows):
    posterior, bnn, path = fixed
    x = torch.randn(num_rows, 4)
    draws = posterior.sample(latent=fixed_latents(posterior.generator, 12, seed=3))
    assert_scores(run(path, x=x), apd.outputs(bnn, draws, x).probs_SNK)


@pytest.mark.slow
def test_the_file_is_plain_and_holds_no_draws(fixed):
    posterior, _, path = fixed
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain for entry in model.opset_import} == {""}
    assert [value.name for value in model.graph.input] == ["x"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    loops = [node for node in model.graph.node if node.op_type == "Scan"]
    assert len(loops) == 1
    kept = {entry.name: onnx.numpy_helper.to_array(entry) for entry in model.graph.initializer}
    own = posterior.generator.state_dict().values()
    assert sum(value.size for value in kept.values()) < sum(value.numel() for value in own) + 12 * 3 + 150
    integers = sorted(value.numel() for value in own if value.dtype in (torch.int8, torch.int16))
    assert sorted(value.size for value in kept.values() if value.dtype == "int8") == integers


@pytest.mark.slow
def test_what_is_the_same_for_all_draws_is_outside_of_the_loop(fixed):
    model = onnx.load(fixed[2])
    (loop,) = [node for node in model.graph.node if node.op_type == "Scan"]
    inside = {name for node in loop.attribute[0].g.node for name in node.input}
    assert not inside & {value.name for value in model.graph.initializer if value.data_type == onnx.TensorProto.INT8}
    assert not [node for node in loop.attribute[0].g.node if node.op_type == "Max"]  # magnitudes are reduced once


@pytest.mark.thorough
def test_latents_may_be_inputs(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_tensors, "_MIN_CODED", 1)
    posterior, bnn = subspace_posterior(1, likelihood="gaussian")
    names = ("mean", "variance", "lower", "upper")
    posterior.bind(bnn).export_onnx(tmp_path / "p.onnx", outputs=names, latent="input", compact=True)
    for num_rows, num_draws in ((1, 4), (5, 2)):
        x, latent_SL = torch.randn(num_rows, 4), torch.randn(num_draws, posterior.latent_size)
        found = run(tmp_path / "p.onnx", x=x, latent=latent_SL)
        expected = apd.outputs(bnn, posterior.sample(latent=latent_SL), x)
        torch.testing.assert_close(found["mean"], expected.mean_SN.mean(0), atol=1e-5, rtol=1e-5)
        total = apd.uncertainty.total_variance(expected.mean_SN, expected.variance_SN)
        torch.testing.assert_close(found["variance"], total, atol=1e-5, rtol=1e-5)
        normal = torch.distributions.Normal(expected.mean_SN, expected.variance_SN.sqrt())
        torch.testing.assert_close(normal.cdf(found["upper"]).mean(0), torch.full((num_rows,), 0.95), atol=1e-4, rtol=0)


NETWORKS = {
    "convolutional": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)), (1, 5, 5)),
    "gru": (lambda: Recurrent(nn.GRU), (3, 4)),
    "lstm": (lambda: Recurrent(nn.LSTM), (3, 4)),
    "attention": (Attention, (3, 8)),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_other_kinds(name, tmp_path):
    make, shape = NETWORKS[name]
    posterior, bnn = low_rank_posterior(make())
    x = torch.randn(6, *shape)
    posterior.export_onnx(tmp_path / "p.onnx", net=bnn, outputs=SCORES, num_draws=5, example=x[:1])
    draws = posterior.sample(latent=fixed_latents(posterior.generator, 5))
    assert_scores(run(tmp_path / "p.onnx", x=x), apd.outputs(bnn, draws, x).probs_SNK)


@pytest.mark.thorough
def test_several_inputs_and_frozen_layers(tmp_path):
    net = TwoInputs()
    posterior, bnn = low_rank_posterior(net)
    inputs = {"x": torch.randn(6, 4), "z": torch.randn(6, 2)}
    posterior.export_onnx(tmp_path / "p.onnx", net=bnn, outputs=SCORES, num_draws=5, example=inputs)
    found = run(tmp_path / "p.onnx", **inputs)
    expected = posterior.prediction(bnn, SCORES, num_draws=5)(*inputs.values())
    for one, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.thorough
def test_int8_is_what_a_file_of_int8_draws(tmp_path):
    posterior, bnn = low_rank_posterior(mlp())
    posterior.generator.deviations.data = 0.1 * torch.randn(80, posterior.layout.size)
    posterior.generator.rank, posterior.generator.latent_size = 80, 80 + posterior.layout.size
    posterior.export_onnx(tmp_path / "p.onnx", net=bnn, outputs=["networks"], num_draws=5, dtype="int8")
    rounded, x = posterior.rounded("int8"), torch.randn(6, 4)
    draws = rounded.sample(latent=fixed_latents(rounded.generator, 5))
    torch.testing.assert_close(run(tmp_path / "p.onnx", x=x)["networks"], apd.outputs(bnn, draws, x).probs_SNK)
    kept = onnx.load(tmp_path / "p.onnx").graph.initializer
    assert [tuple(value.dims) for value in kept if value.data_type == onnx.TensorProto.INT8] == [
        (80, posterior.layout.size)
    ]


@pytest.mark.slow
def test_a_network_that_depends_on_values_is_refused(tmp_path):
    class Branching(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    posterior, _ = subspace_posterior()
    net = Branching(*mlp())
    with pytest.raises(apd.ExportError, match="cannot export this network"):
        posterior.export_onnx(tmp_path / "p.onnx", net=net, link="softmax")
    assert not (tmp_path / "p.onnx").exists()


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_refused(fixed):
    posterior, bnn, path = fixed
    other = posterior.prediction(bnn, SCORES, num_draws=12, seed=4)
    with pytest.raises(apd.ExportError, match="'mean' of the exported file differs"):
        checking.check_file(path.read_bytes(), other, {"x": torch.zeros(1, 4)})
    fewer = posterior.prediction(bnn, ("networks", *SCORES[1:]), num_draws=12, seed=3)
    with pytest.raises(apd.ExportError, match="has shape"):
        checking.check_file(path.read_bytes(), fewer, {"x": torch.zeros(1, 4)})
    with pytest.raises(apd.ExportError, match="does not run"):
        checking.check_file(b"nothing", other, {"x": torch.zeros(1, 4)})


def test_settings_that_cannot_be(tmp_path):
    posterior, bnn = subspace_posterior()
    for settings, message in (
        ({"outputs": ("median",)}, "outputs"),
        ({"num_draws": 0}, "num_draws"),
        ({"latent": "random"}, "'fixed', 'input'"),
        ({"dtype": "int4"}, "'float32', 'int8'"),
        ({"seed": -1}, "seed"),
        ({"example": {"x": torch.zeros(())}}, "at least one row"),
    ):
        with pytest.raises(ValueError, match=message):
            posterior.export_onnx(tmp_path / "p.onnx", net=bnn, **settings)
    with pytest.raises(ValueError, match="Pass net="):
        posterior.export_onnx(tmp_path / "p.onnx")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    posterior, bnn = subspace_posterior()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"'onnxscript', which is not installed: pip install 'pyro-apd\[onnx\]'"):
        posterior.export_onnx(tmp_path / "p.onnx", net=bnn)


def test_examples_of_inputs():
    assert network_inputs(mlp(), None)["x"].shape == (1, 4)
    assert list(network_inputs(mlp(), (torch.zeros(1, 2), torch.zeros(1, 3)))) == ["x_0", "x_1"]
    assert list(network_inputs(mlp(), {"ids": torch.zeros(1, 2)})) == ["ids"]
    with pytest.raises(apd.ExportError, match="Pass example=x"):
        network_inputs(Attention(), None)


@pytest.mark.slow
def test_torch_export():
    posterior, bnn = subspace_posterior()
    module = posterior.prediction(bnn, SCORES, num_draws=3)
    program = torch.export.export(module, (torch.randn(4, 4),), dynamic_shapes=(({0: torch.export.Dim.DYNAMIC},),))
    x = torch.randn(7, 4)
    for one, other in zip(program.module()(x), module(x), strict=True):
        torch.testing.assert_close(one, other)
