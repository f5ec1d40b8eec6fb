# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch

import pyro_apd as apd
from pyro_apd.chains.summary import sampler_summary
from pyro_apd.cli.main import main
from pyro_apd.cli.report import image_size, load_data, load_model
from pyro_apd.diagnostics import save_netcdf, to_arviz
from pyro_apd.diagnostics.arviz_export.stored import StoredRun
from pyro_apd.diagnostics.comparison.doubts import doubts
from pyro_apd.diagnostics.html import pictures
from pyro_apd.generators import build_generator
from pyro_apd.kernels.adaptation.drift import Drift, DriftWatch
from pyro_apd.models.layout import Layout
from pyro_apd.posterior.posterior import DistilledPosterior
from tests.support.models import Conjugate

MODEL = """
import pyro, pyro.distributions as dist, torch

SHAPES = {"hidden.weight": (4, 2), "hidden.bias": (4,), "out.weight": (3, 4), "out.bias": (3,)}

def network(x, y=None):
    w = {n: pyro.sample(n, dist.Normal(0.0, 1.0).expand(list(s)).to_event(len(s))) for n, s in SHAPES.items()}
    hidden = torch.tanh(x @ w["hidden.weight"].T + w["hidden.bias"])
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=hidden @ w["out.weight"].T + w["out.bias"]), obs=y)

class Holder:
    def __call__(self, x):
        return x

number = 3
"""


@pytest.fixture(scope="module")
def folder(case, tmp_path_factory):
    """A folder with a chain, a posterior, data and a module."""
    folder = tmp_path_factory.mktemp("files")
    mcmc = case.StubMCMC(case.chain(2, 50), case.model)
    save_netcdf(to_arviz(mcmc), folder / "chains.nc")
    layout = Layout({name: tuple(value.shape) for name, value in case.centre.items()})
    torch.manual_seed(0)
    generator = build_generator({"kind": "paper", "output_size": layout.size, "latent_size": 4, "width": 8})
    DistilledPosterior(layout, generator).save(folder / "posterior.safetensors")
    np.savez(folder / "data.npz", x=case.x.double().numpy(), y=case.y.numpy(), ood_far=case.ood["far"].numpy())
    (folder / "nets_of_test_command.py").write_text(MODEL)
    return folder


@pytest.fixture
def files(folder, monkeypatch):
    """The folder as the current one, and reports without pictures."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(pictures, "picture", lambda draw, size, caption: pictures.Picture("", "", caption, 1))
    return folder


@pytest.mark.slow
def test_report_from_files(files, capsys):
    options = ["--model", "nets_of_test_command:network", "--data", "data.npz", "--out", "page.html"]
    options += ["--title", "From files", "--num-samples", "40"]
    assert main(["report", "chains.nc", "posterior.safetensors", *options]) == 0
    assert capsys.readouterr().out.strip().endswith("page.html")
    page = (files / "page.html").read_text()
    for words in ("From files", "SGLD chain", "out of distribution: far", "step_size", "potential", "NLL"):
        assert words in page
    assert "2 chains of 50 stored draws, 1 of them diverging" in page


def test_weights_alone(files):
    assert main(["report", "chains.nc", "posterior.safetensors"]) == 0
    assert "No inputs were given" in (files / "report.html").read_text()


def test_stored_run_is_the_run(case, files):
    run = StoredRun("chains.nc")
    draws = case.StubMCMC(case.chain(2, 50), case.model).get_samples(group_by_chain=True)
    assert (run.num_chains, run.num_samples, run.chain_name) == (2, 50, "SGLD")
    assert run.settings["step_size"] == 1e-3
    for name, value in run.get_samples(group_by_chain=True).items():
        assert torch.equal(value, draws[name])
        assert torch.equal(run.get_samples()[name], draws[name].flatten(0, 1))
    with pytest.raises(ValueError, match=r"num_samples.*file; got 3"):
        run.get_samples(3)


def test_a_stored_run_says_how_it_was_sampled(tmp_path, monkeypatch):
    problem = Conjugate()
    monkeypatch.setattr(DriftWatch, "drifts", lambda self, temperature: [Drift("potential", None, 3.0, 1.0)])
    mcmc = apd.MCMC(apd.SGLD(problem.full, "auto", seed=0), 30, 5, disable_progbar=True)
    with pytest.warns(apd.WarmupWarning):
        mcmc.run(problem.x, problem.y)
    save_netcdf(to_arviz(mcmc), tmp_path / "chains.nc")
    stored = StoredRun(tmp_path / "chains.nc")
    assert sampler_summary(stored) == sampler_summary(mcmc)
    (doubt,) = doubts(stored, None)
    assert doubt.startswith("The run warned: The warm-up of 5 Langevin steps was too short")


@pytest.mark.parametrize(("text", "expected"), [("8x8", (8, 8)), ("3x28x32", (3, 28, 32))])
def test_sizes_of_images(text, expected):
    assert image_size(text) == expected


@pytest.mark.parametrize("text", ["8", "8x", "x8", "0x8", "8x8.5", "1x2x3x4", "8 x 8", "-8x8"])
def test_sizes_of_images_that_are_none(text):
    with pytest.raises(ValueError, match="--image must be ROWSxCOLUMNS or CHANNELSxROWSxCOLUMNS, such as 8x8; got"):
        image_size(text)


def test_an_image_of_another_size_is_found_before_anything_is_computed(files, capsys, monkeypatch):
    monkeypatch.setattr("pyro_apd.diagnostics.html.report.compare", lambda *a, **k: pytest.fail("computed"))
    options = ["--model", "nets_of_test_command:network", "--data", "data.npz", "--image", "8x8"]
    assert main(["report", "chains.nc", "posterior.safetensors", *options]) == 2
    assert "(8, 8) does not fit inputs of 2 numbers" in capsys.readouterr().err


def test_files_without_a_chain(case, files):
    save_netcdf(to_arviz(posterior=case.posterior()), "apd.nc")
    with pytest.raises(ValueError, match=r"no draws of a chain.*of a generator"):
        StoredRun("apd.nc")
    save_netcdf(to_arviz(case.chain(2, 9), max_parameters=3, group_by_chain=True), "few.nc")
    with pytest.raises(ValueError, match=r"\['parameters'\].*all weights"):
        StoredRun("few.nc")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["absent.nc", "posterior.safetensors"], "no file 'absent.nc'"),
        (["chains.nc", "absent.safetensors"], "absent.safetensors"),
        (["chains.nc", "chains.nc"], "chains.nc"),
        (["chains.nc", "posterior.safetensors", "--data", "data.npz"], "--data needs --model"),
        (["chains.nc", "posterior.safetensors", "--model", "m:n"], "--model needs --data"),
        (["chains.nc", "posterior.safetensors", "--model", "m:n", "--data", "data.npz"], "No module named 'm'"),
    ],
)
def test_errors_are_one_line(files, capsys, options, message):
    assert main(["report", *options]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.strip().splitlines()) == 1


def test_models_by_name(files):
    assert load_model("nets_of_test_command:network").__name__ == "network"
    assert load_model("nets_of_test_command:Holder")(4) == 4
    for name, message in [("network", "must be MODULE:CALLABLE"), ("nets_of_test_command:absent", "no attribute")]:
        with pytest.raises(ValueError, match=message):
            load_model(name)
    with pytest.raises(ValueError, match="is a int, which cannot be called"):
        load_model("nets_of_test_command:number")


def test_data_from_a_file(case, files):
    x, y, ood = load_data(files / "data.npz")
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, case.x)
    assert torch.equal(y, case.y)
    assert list(ood) == ["far"]
    np.savez("other.npz", z=np.zeros(3))
    with pytest.raises(ValueError, match=r"holds \['z'\].*as x"):
        load_data(files / "other.npz")
    (files / "text.npz").write_text("no arrays")
    with pytest.raises(ValueError, match=r"not an \.npz file"):
        load_data(files / "text.npz")
    np.savez("objects.npz", x=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"not an \.npz file of plain arrays"):
        load_data(files / "objects.npz")
