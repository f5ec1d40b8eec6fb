# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import json
import re
import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS

from pyro_apd.diagnostics import save_netcdf, to_arviz
from pyro_apd.diagnostics.arviz_export import compat, predictions
from pyro_apd.diagnostics.arviz_export.export import chain_diagnostics
from pyro_apd.predictive import predictive
from pyro_apd.predictive.predictive import outputs


def groups(idata):
    found = idata.groups() if callable(idata.groups) else idata.groups
    return {name.strip("/") for name in found} - {""}


@pytest.fixture
def mcmc(case):
    return case.StubMCMC(case.chain(2, 6), case.model, (case.x, case.y))


def test_chain_and_generator_side_by_side(case, mcmc):
    idata = to_arviz(mcmc, case.posterior(), seed=3)
    predictions = {"posterior_predictive", "log_likelihood"}
    assert groups(idata) == {
        *("posterior", "posterior_apd", "sample_stats", "observed_data"),
        *predictions,
        *(f"{name}_apd" for name in predictions),
    }
    weight = idata["posterior"]["hidden.weight"]
    assert weight.dims == ("chain", "draw", "hidden_unit", "hidden_input")
    assert idata["posterior"]["hidden.bias"].dims == ("chain", "draw", "hidden_unit")
    np.testing.assert_array_equal(weight.values, mcmc.get_samples(group_by_chain=True)["hidden.weight"].numpy())
    assert idata["posterior_apd"]["hidden.weight"].shape == (1, 6, 4, 2)
    np.testing.assert_array_equal(idata["observed_data"]["y"].values, case.y.numpy())


def test_sample_stats_hold_what_the_kernel_recorded(mcmc):
    stats = to_arviz(mcmc)["sample_stats"]
    assert set(stats.data_vars) == {"diverging", "potential"}
    assert stats["diverging"].values.tolist() == [[False, True] + [False] * 4, [False] * 6]
    np.testing.assert_array_equal(stats["potential"].values[1], mcmc._diagnostics[1]["potential"].numpy())


def test_sample_stats_mark_excursions(case, mcmc):
    for record, draws in zip(mcmc._diagnostics, ([1, 4, 6], []), strict=True):  # a chain may be longer than the others
        record["excursions"] = draws
    stats = to_arviz(mcmc)["sample_stats"]
    assert set(stats.data_vars) == {"diverging", "excursion", "potential"}
    assert stats["excursion"].dtype == bool
    assert stats["excursion"].values.tolist() == [[False, True, False, False, True, False], [False] * 6]


def test_attributes_say_where_it_came_from(case, mcmc):
    idata = to_arviz(mcmc, case.posterior())
    settings = json.loads(idata.attrs["kernel_settings"])
    assert settings["kernel"] == "SGLD"
    assert settings["step_size"] == 1e-3
    assert settings["num_chains"] == 2
    assert json.loads(idata.attrs["versions"])["torch"] == torch.__version__
    assert idata["posterior"].attrs["source"] == "SGLD"
    assert json.loads(idata["posterior_apd"].attrs["metadata"])["note"] == "<b>&"


def test_only_a_generator_fills_the_group_that_arviz_looks_at(case):
    idata = to_arviz(posterior=case.posterior(), num_samples=20, seed=0)
    assert groups(idata) == {"posterior", "posterior_apd"}
    posterior, apd = idata["posterior"]["out.bias"].values, idata["posterior_apd"]["out.bias"].values
    assert posterior.shape == (1, 20, 3)
    assert np.shares_memory(posterior, apd)
    assert idata["posterior"].attrs["source"] == "generator"


def test_draws_come_as_a_dict_too(case):
    chain = case.chain(2, 6)
    grouped = to_arviz(chain, group_by_chain=True)["posterior"]["out.bias"]
    assert grouped.shape == (2, 6, 3)
    by_shapes = to_arviz(chain, case.posterior())["posterior"]["out.bias"]
    assert by_shapes.shape == (2, 6, 3)
    pooled = to_arviz({n: v.flatten(0, 1) for n, v in chain.items()})["posterior"]["out.bias"]
    assert pooled.shape == (1, 12, 3)


def test_seed_gives_the_same_draws_and_leaves_the_global_state(case):
    before = torch.get_rng_state()
    first = to_arviz(posterior=case.posterior(), seed=3)["posterior_apd"]["out.bias"].values
    assert torch.equal(torch.get_rng_state(), before)
    assert (to_arviz(posterior=case.posterior(), seed=3)["posterior_apd"]["out.bias"].values == first).all()
    assert (to_arviz(posterior=case.posterior(), seed=4)["posterior_apd"]["out.bias"].values != first).any()


def test_var_names(case, mcmc):
    idata = to_arviz(mcmc, case.posterior(), var_names=["out.bias"])
    assert list(idata["posterior"].data_vars) == ["out.bias"] == list(idata["posterior_apd"].data_vars)
    with pytest.raises(ValueError, match=r"\['nix'\].*hidden.bias"):
        to_arviz(mcmc, var_names=["nix"])


def test_predictions_and_likelihoods_of_both(case, mcmc):
    idata = to_arviz(mcmc, case.posterior(), seed=3)
    draws = mcmc.get_samples(group_by_chain=True)
    one = {n: v[1, 4:5] for n, v in draws.items()}
    expected = predictive.log_likelihood(case.model, one, case.x, case.y)[0]
    np.testing.assert_allclose(idata["log_likelihood"]["y"].values[1, 4], expected, rtol=1e-5)
    generated = {n: torch.as_tensor(idata["posterior_apd"][n].values[0]) for n in draws}
    expected = predictive.log_likelihood(case.model, generated, case.x, case.y)
    np.testing.assert_allclose(idata["log_likelihood_apd"]["y"].values[0], expected, rtol=1e-5)
    labels = idata["posterior_predictive"]["y"].values
    assert labels.shape == (2, 6, 150)
    assert set(np.unique(labels)) == {0, 1, 2}
    assert (labels.reshape(12, 150) != case.y.numpy()).any()  # sampled, not the observations
    assert 0.7 < (labels == case.y.numpy()).mean() < 1.0
    np.testing.assert_array_equal(labels, to_arviz(mcmc, seed=3)["posterior_predictive"]["y"].values)


def test_predictions_on_other_inputs(case, mcmc):
    idata = to_arviz(mcmc, x=case.x[:7], y=case.y[:7])
    assert idata["log_likelihood"]["y"].shape == (2, 6, 7)
    np.testing.assert_array_equal(idata["observed_data"]["y"].values, case.y[:7].numpy())
    without = to_arviz(mcmc, x=case.x[:7])
    assert groups(without) == {"posterior", "sample_stats", "posterior_predictive"}
    alone = to_arviz(posterior=case.posterior(), model=case.model, x=case.x[:7], y=case.y[:7], num_samples=5)
    assert alone["log_likelihood"]["y"].shape == alone["log_likelihood_apd"]["y"].shape == (1, 5, 7)


def test_what_would_be_large_waits_until_it_is_asked_for(mcmc, monkeypatch):
    monkeypatch.setattr(predictions, "LARGEST_UNASKED", 1000)
    assert not groups(to_arviz(mcmc)) & {"posterior_predictive", "log_likelihood"}
    assert "log_likelihood" in groups(to_arviz(mcmc, log_likelihood=True))
    monkeypatch.undo()
    assert not groups(to_arviz(mcmc, log_likelihood=False, posterior_predictive=False)) & {"log_likelihood"}


def test_prior_on_request(case, mcmc):
    prior = to_arviz(mcmc, prior=50, seed=0)["prior"]
    assert prior["hidden.weight"].shape == (1, 50, 4, 2)
    assert prior["hidden.weight"].values.std() == pytest.approx(1.0, abs=0.2)
    with pytest.raises(ValueError, match=r"prior=-1 must be an integer >= 0"):
        to_arviz(mcmc, prior=-1)


def test_some_weights_instead_of_all(case, mcmc):
    idata = to_arviz(mcmc, case.posterior(), max_parameters=5)
    some = idata["posterior"]["parameters"]
    assert some.shape == (2, 6, 5)
    assert list(idata["posterior"].data_vars) == ["parameters"] == list(idata["posterior_apd"].data_vars)
    assert some["layer"].values.tolist() == ["hidden", "hidden", "out", "out", "out"]
    draws = mcmc.get_samples(group_by_chain=True)
    for i, label in enumerate(some["parameter"].values):
        site, _, index = str(label).partition("[")
        entry = draws[site][(..., *(int(part) for part in index.rstrip("]").split(", ")))]
        np.testing.assert_array_equal(some.values[:, :, i], entry.numpy())
        assert some["site"].values[i] == site
        assert some["unit"].values[i] == int(index.rstrip("]").split(", ")[0])
    assert "hidden.weight" in to_arviz(mcmc, max_parameters=27)["posterior"].data_vars
    with pytest.raises(ValueError, match=r"max_parameters=0 must be a positive integer"):
        to_arviz(mcmc, max_parameters=0)


def test_projections_and_functions_instead_of_weights(case):
    mcmc = case.StubMCMC(case.chain(4, 100), case.model, (case.x, case.y))
    idata = to_arviz(mcmc, case.posterior(), var_names=[], projections=6, functions=4, seed=1)
    for group in ("posterior", "posterior_apd"):
        assert set(idata[group].data_vars) == {"projections", "functions"}
    chain, generator = (idata[group]["projections"].values.reshape(-1, 6) for group in ("posterior", "posterior_apd"))
    np.testing.assert_allclose(chain.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(chain.std(0), 1, atol=0.25)  # of independent weights
    np.testing.assert_allclose(generator.std(0), 1, atol=0.4)
    functions = idata["posterior"]["functions"]
    draws = mcmc.get_samples(group_by_chain=True)
    probs = outputs(case.model, {n: v.flatten(0, 1) for n, v in draws.items()}, case.x).probs_SNK
    for i, label in enumerate(functions["function"].values):
        which, row = re.match(r"p\(class (\d)\) at input (\d+)", str(label)).groups()
        np.testing.assert_allclose(
            functions.values[:, :, i].ravel(), probs[:, int(row), int(which)].numpy(), rtol=1e-4, atol=1e-6
        )
    assert list(idata["posterior_apd"]["function"].values) == list(functions["function"].values)
    with pytest.raises(ValueError, match=r"`functions` asks.*no model"):
        to_arviz(case.chain(2, 6), functions=3)
    with pytest.raises(ValueError, match=r"projections=-1 must be an integer >= 0"):
        to_arviz(mcmc, projections=-1)


def test_what_is_asked_for_and_cannot_be_is_an_error(case, mcmc):
    with pytest.raises(ValueError, match=r"`log_likelihood` was asked for.*pass `model`"):
        to_arviz(case.chain(2, 6), log_likelihood=True)
    with pytest.raises(ValueError, match="no observations here"):
        to_arviz(mcmc, x=case.x, log_likelihood=True)


def test_half_precision(case):
    draws = {n: v.bfloat16() for n, v in case.chain(2, 6).items()}
    assert to_arviz(draws, group_by_chain=True)["posterior"]["out.bias"].dtype == np.float32


def test_nuts_and_arviz_functions(case):
    x = torch.randn(20, 2)
    y = x @ torch.tensor([1.0, -1.0]) + 0.1 * torch.randn(20)
    mcmc = MCMC(NUTS(case.regression, jit_compile=False), num_samples=15, warmup_steps=15, disable_progbar=True)
    mcmc.run(x, y)
    idata = to_arviz(mcmc)
    assert idata["posterior"]["weight"].shape == (1, 15, 2)
    assert idata["posterior"]["scale"].shape == (1, 15)
    assert (idata["posterior"]["scale"].values > 0).all()
    assert idata["sample_stats"]["diverging"].dtype == bool
    np.testing.assert_allclose(idata["observed_data"]["y"].values, y.numpy())
    summary = compat.import_arviz().summary(idata, kind="stats")
    assert list(summary.index) == ["weight[0]", "weight[1]", "scale"] or set(summary.index) == {
        *("scale", "weight[0]", "weight[1]")
    }


def test_observed_data_leaves_out_what_is_not_data(case):
    def model(x, y):
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * weight)
        pyro.factor("penalty", -(weight**2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(weight * x, 1.0), obs=y)

    x = torch.randn(5)
    idata = to_arviz(case.StubMCMC({"weight": torch.randn(1, 4)}, model, (x, x)))
    assert list(idata["observed_data"].data_vars) == ["y"]


def test_no_observed_data_where_the_run_saw_only_batches(case):
    def subsampled(x):
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=2) as index:
            pyro.sample("y", dist.Normal(weight, 1.0), obs=x[index])

    draws = {"weight": torch.randn(1, 4)}
    assert "observed_data" not in groups(to_arviz(case.StubMCMC(draws, subsampled, (torch.randn(5),))))
    loader = torch.utils.data.DataLoader(torch.randn(5))
    assert "observed_data" not in groups(to_arviz(case.StubMCMC(draws, subsampled, (loader,))))


def test_a_model_that_fails_costs_only_the_observed_data(mcmc, caplog):
    def model(x, y):
        raise RuntimeError("no such layer")

    assert "observed_data" not in groups(to_arviz(mcmc, model=model))
    assert "no such layer" in caplog.text
    with pytest.raises(RuntimeError, match="no such layer"):
        to_arviz(mcmc, model=model, log_likelihood=True)


def test_diagnostics_fall_back_to_the_public_way(case):
    class Driver:
        num_chains = 2

        def diagnostics(self):
            return {"weight": {"n_eff": 1.0}, "divergences": {"chain 0": [1], "chain 1": []}}

    assert chain_diagnostics(Driver()) == [{"divergences": [1]}, {"divergences": []}]
    assert chain_diagnostics(object()) == []
    idata = to_arviz(case.StubMCMC(case.chain(2, 6), case.model, diagnostics=True))
    assert "sample_stats" in groups(idata)


@pytest.mark.parametrize(
    ("mcmc", "posterior", "error", "message"),
    [
        (None, None, ValueError, "got neither"),
        (3, None, TypeError, "MCMC after run.*int"),
        (None, "x", TypeError, "get_samples.*str"),
        ({}, None, ValueError, "at least one site"),
        ({"a": torch.zeros(0, 3)}, None, ValueError, "zero draws"),
        ({"a": torch.zeros(5), "b": torch.zeros(6)}, None, ValueError, "different numbers of draws"),
        (None, {"a": torch.zeros(5), "b": torch.zeros(6)}, ValueError, "different numbers of draws"),
        ({"a": torch.tensor([1.0, float("nan")])}, None, ValueError, "'a'.*NaN"),
        ({"a": [1.0]}, None, ValueError, "got list"),
        (MCMC(NUTS(lambda: None), num_samples=2), None, ValueError, "call mcmc.run"),
    ],
)
def test_errors_say_what_came(mcmc, posterior, error, message):
    with pytest.raises(error, match=message):
        to_arviz(mcmc, posterior)


def test_netcdf_is_written_whole_or_not_at_all(case, tmp_path, monkeypatch):
    path = tmp_path / "chains.nc"
    idata = to_arviz(case.chain(2, 6), case.posterior())
    assert save_netcdf(idata, path) == path
    read = compat.import_arviz().from_netcdf(path)
    np.testing.assert_array_equal(read["posterior"]["out.bias"].values, idata["posterior"]["out.bias"].values)

    def fail(idata, path):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(compat, "write", fail)
    before = path.read_bytes()
    with pytest.raises(OSError, match="disk full"):
        save_netcdf(idata, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["chains.nc"]
    with pytest.raises(FileNotFoundError, match="no folder"):
        save_netcdf(idata, tmp_path / "absent" / "chains.nc")


@pytest.mark.slow
def test_importing_the_room_brings_neither_arviz_nor_matplotlib():
    code = "import sys, pyro_apd.diagnostics; print({'arviz', 'matplotlib', 'pandas', 'jinja2'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples=0 must be a positive integer"),
        ({"num_samples": 2.5}, "num_samples=2.5"),
        ({"prior": 2.5}, "prior=2.5"),
        ({"functions": "a"}, "functions='a'"),
        ({"projections": 1.5}, "projections=1.5"),
        ({"max_parameters": True}, "max_parameters=True"),
        ({"var_names": "a"}, "`var_names` must be a list of names"),
        ({"var_names": 3}, "`var_names` must be a list of names"),
        ({"seed": "a"}, "seed"),
        ({"group_by_chain": 3}, "group_by_chain=3 must be True or False"),
        ({"mcmc": {"a": torch.zeros(5).to_sparse()}}, "sparse"),
        ({"mcmc": {"a": torch.zeros(5, 0)}}, "holds no numbers"),
    ],
)
def test_settings_that_are_none(changes, message):
    with pytest.raises(ValueError, match=message):
        to_arviz(**{"mcmc": {"a": torch.zeros(5)}, "posterior": {"a": torch.zeros(5)}, **changes})


def test_a_layer_whose_weights_and_biases_have_other_units_has_dimensions_of_its_own():
    """As a transposed convolution has, whose weight begins with its inputs."""
    idata = to_arviz({"net.weight": torch.zeros(5, 4, 3, 2), "net.bias": torch.zeros(5, 3)})
    assert idata.posterior["net.weight"].dims[2:] == ("net.weight_dim_0", "net.weight_dim_1", "net.weight_dim_2")
    assert idata.posterior["net.bias"].dims[2:] == ("net.bias_dim_0",)
