# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The shim between the two ArviZ generations.

It is loaded by path and needs NumPy and ArviZ alone, so that this file also runs where ArviZ 1.x is, on Python 3.12
without torch: ``python -m pytest --noconftest -c /dev/null tests/diagnostics/arviz_export/test_compat.py``.
"""

import importlib.util
import pathlib

import numpy as np
import pytest

PATH = pathlib.Path(__file__).parents[3] / "pyro_apd" / "diagnostics" / "arviz_export" / "compat.py"


@pytest.fixture(scope="module")
def compat():
    spec = importlib.util.spec_from_file_location("arviz_compat", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def groups():
    rng = np.random.default_rng(0)
    return {
        "posterior": {"net.0.weight": rng.normal(size=(2, 5, 3, 4)).astype(np.float32)},
        "posterior_apd": {"net.0.weight": rng.normal(size=(1, 7, 3, 4)).astype(np.float32)},
        "sample_stats": {"diverging": np.zeros((2, 5), dtype=bool)},
        "observed_data": {"y": np.arange(6)},
    }


def names(idata):
    found = idata.groups() if callable(idata.groups) else idata.groups
    return {name.strip("/") for name in found} - {""}


def test_groups_dims_values_and_attributes(compat, groups):
    idata = compat.build(groups, {"/": {"versions": "1"}, "posterior_apd": {"source": "generator"}, "absent": {}})
    assert names(idata) == set(groups)
    for group, arrays in groups.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(idata[group][name].values, array)
    weight = idata["posterior_apd"]["net.0.weight"]
    assert weight.dims == ("chain", "draw", "net.0.weight_dim_0", "net.0.weight_dim_1")
    assert weight.dtype == np.float32
    assert idata["observed_data"]["y"].dims == ("y_dim_0",)
    assert idata.attrs["versions"] == "1"
    assert idata["posterior_apd"].attrs["source"] == "generator"


def test_named_dimensions_and_several_labels_of_one(compat):
    labels = {"parameter": ("parameter", ["a[0]", "b[1]"]), "layer": ("parameter", ["a", "b"])}
    some = compat.Variable(np.arange(8.0).reshape(2, 2, 2), ("parameter",), labels)
    shared = {name: compat.Variable(np.zeros((2, 2, 3)), ("unit",)) for name in ("weight", "bias")}
    posterior = compat.build({"posterior": {"parameters": some, **shared}}, {})["posterior"]
    assert posterior["parameters"].sel(parameter="b[1]").values.tolist() == [[1, 3], [5, 7]]
    assert posterior["layer"].values.tolist() == ["a", "b"]
    assert posterior["weight"].dims == ("chain", "draw", "unit") == posterior["bias"].dims
    assert posterior["unit"].values.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"'a' has 3 dimensions.*one name for each"):
        compat.build({"posterior": {"a": compat.Variable(np.zeros((2, 2, 3)), ())}}, {})


def test_labels_survive_a_file(compat, tmp_path):
    labels = {"parameter": ("parameter", ["a[0]", "b[1]"]), "layer": ("parameter", ["a", "b"])}
    some = compat.Variable(np.zeros((2, 2, 2)), ("parameter",), labels)
    compat.write(
        compat.build({"posterior": {"parameters": some}}, {"posterior": {"source": "SGLD"}}), tmp_path / "c.nc"
    )
    read = compat.read(tmp_path / "c.nc")
    assert read["posterior"]["layer"].values.tolist() == ["a", "b"]
    assert read["posterior"].attrs["source"] == "SGLD"
    assert compat.arrays(read, "posterior")["parameters"].shape == (2, 2, 2)
    assert compat.arrays(read, "absent") == {}


def test_files_that_are_none(compat, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*chains\.nc"):
        compat.read(tmp_path / "absent.nc")
    (tmp_path / "text.nc").write_text("no netCDF")
    with pytest.raises(ValueError, match=r"(?s)cannot be read as NetCDF.*pass the chains\.nc"):
        compat.read(tmp_path / "text.nc")


def test_summary_takes_the_container(compat, groups):
    summary = compat.import_arviz().summary(compat.build(groups, {}), kind="stats")
    assert len(summary) == 12


def test_empty_groups_are_left_out(compat, groups):
    assert names(compat.build({**groups, "observed_data": {}}, {})) == set(groups) - {"observed_data"}
    assert names(compat.build({"posterior": groups["posterior"]}, {})) == {"posterior"}


def test_more_chains_than_draws_is_no_warning(compat):
    idata = compat.build({"posterior": {"a": np.zeros((4, 2))}, "posterior_apd": {"a": np.zeros((4, 2))}}, {})
    assert dict(idata["posterior"].sizes) == {"chain": 4, "draw": 2}


def test_file_opens_again_and_is_not_compressed(compat, groups, tmp_path):
    idata = compat.build(groups, {"/": {"versions": "1"}})
    compat.write(idata, tmp_path / "chains.nc")
    read = compat.import_arviz().from_netcdf(tmp_path / "chains.nc")
    assert names(read) == set(groups)
    weight = read["posterior"]["net.0.weight"]
    np.testing.assert_array_equal(weight.values, groups["posterior"]["net.0.weight"])
    assert not weight.encoding.get("zlib")
    assert weight.encoding.get("compression") is None
    assert read["sample_stats"]["diverging"].dtype == bool


def test_statistics_take_plain_arrays(compat):
    arviz = compat.import_arviz()
    values = np.random.default_rng(0).normal(size=(4, 100))
    assert float(arviz.rhat(values)) == pytest.approx(1.0, abs=0.05)
    assert float(arviz.ess(values, method="bulk")) > 200
