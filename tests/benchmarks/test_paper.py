# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The paper's experiments run, on the smoke budget, and go on where they were interrupted."""

import json
import os
from functools import partial

import pytest
import torch

from benchmarks import distillation_cases
from benchmarks.paper import __main__ as command
from benchmarks.paper import classification, methods, ood, toy, uci
from benchmarks.paper.common import Options, Results, mean_and_sd, plus_minus, write_table
from benchmarks.paper.ood import presented, published
from benchmarks.paper.registry import NAMES, available, find
from benchmarks.paper.settings import image_setting


def test_every_experiment_is_complete():
    assert {"toy", "classification", "ood", "uci"} <= set(available()) <= set(NAMES)
    for name in available():
        assert callable(find(name).run)
        assert callable(find(name).table)


@pytest.mark.slow
@pytest.mark.usefixtures("benchmark_cache")
@pytest.mark.parametrize(
    ("name", "protocol", "in_table"),
    [
        ("toy", "corrected", "| NUTS | 0.0000 |"),
        pytest.param("classification", "faithful", "| MC-dropout | ", marks=pytest.mark.thorough),
        pytest.param("classification", "corrected", "| APD | ", marks=pytest.mark.thorough),
        pytest.param("ood", "faithful", "In the paper's form", marks=pytest.mark.thorough),
        pytest.param("ood", "corrected", "* APD: ", marks=pytest.mark.thorough),
        ("uci", "corrected", "| line | APD |"),
    ],
)
def test_smoke(name, protocol, in_table, tmp_path, capsys, monkeypatch):
    arguments = [name, "--protocol", protocol, "--budget", "smoke", "--results", str(tmp_path), "--threads", "1"]
    command.main(arguments)
    stored = json.loads((tmp_path / f"paper_{name}_{protocol}_smoke.json").read_text())
    assert stored["figures"]
    assert all("seconds" in figures for figures in stored["figures"].values())
    first = capsys.readouterr().out
    assert in_table in first
    assert in_table in (tmp_path / "paper_tables.md").read_text()
    if find(name).figure is not None:
        picture = tmp_path / f"paper_{name}_{protocol}_smoke.png"
        assert picture.stat().st_size > 5000

    def again(*args, **kwargs):
        raise AssertionError("what was stored is run again")

    for module in (methods, toy, classification, ood):
        monkeypatch.setattr(module, "fitted", again)
    monkeypatch.setattr(uci, "one_split", again)
    command.main(arguments)
    assert in_table in capsys.readouterr().out


@pytest.mark.slow
def test_a_split_takes_the_prior_that_its_own_held_out_training_rows_prefer(monkeypatch):
    options = Options("corrected", "smoke")
    problem, _ = uci.make_problem("line", 0)
    seen = []

    def scored(preferred, tried, draws, unit):
        assert not (tried.test[0][:, None] == tried.train[0]).any(), "scored on rows that the chain has seen"
        assert not torch.isin(tried.test[0], problem.test[0]).any(), "scored on test rows"
        assert {len(tried.train[0]), len(tried.test[0])} == {27, 3}
        scale = float(tried.model.priors["net.0.weight"].base_dist.scale.flatten()[0])
        seen.append(scale)
        return {"log_likelihood": float(scale == preferred)}

    for prior_scale, sd in (("fan_in", 1.0), (0.5, 0.5)):
        monkeypatch.setattr(uci, "figures", partial(scored, sd))
        assert uci.chosen_prior(problem, 0, options) == prior_scale
    assert seen == [1.0, 0.5, 1.0, 0.5]


def test_results_are_kept_as_they_come(tmp_path):
    options = Options("faithful", "smoke", results=tmp_path)
    done = []

    def failing():
        raise KeyboardInterrupt

    jobs = [("a", lambda: done.append("a") or {"value": 1.5}), ("b", failing)]
    with pytest.raises(KeyboardInterrupt):
        Results("some", options).run(jobs)
    resumed = Results("some", options)
    resumed.run([jobs[0], ("b/c", lambda: {"value": 2.5})])
    assert done == ["a"]
    assert resumed.under("b")["c"]["value"] == 2.5
    assert Results("some", Options("faithful", "smoke", again=True, results=tmp_path)).figures == {}
    assert Results("some", Options("corrected", "smoke", results=tmp_path)).figures == {}


def test_methods_can_be_chosen(monkeypatch, tmp_path):
    assert methods.methods(Options("corrected", "smoke", only=("SGLD", "stored"))) == ["SGLD", "stored draws, thinned"]
    monkeypatch.setenv("PYRO_APD_DATA", str(tmp_path))
    assert not set(methods.EXPENSIVE) & set(methods.methods(Options("corrected", "cpu")))
    assert methods.methods(Options("corrected", "cpu", only=("APD, online",))) == ["APD, online"]
    assert set(methods.methods(Options("faithful", "full"))) == set(methods.PUBLISHED)
    assert set(methods.methods(Options("corrected", "smoke"))) == set(methods.METHODS)


def test_networks_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("PYRO_APD_DATA", str(tmp_path))
    assert classification.networks(Options("corrected", "cpu")) == ((100,),)
    assert classification.networks(Options("corrected", "full")) == ((100,), (400, 400))
    asked = tuple(command.hidden_layers(text) for text in ("400-400", "100"))
    assert classification.networks(Options("corrected", "cpu", networks=asked)) == ((400, 400), (100,))
    assert classification.networks(Options("corrected", "cpu", networks=asked, digits=True)) == ((100,),)


def test_tables_replace_their_own_kind_only(tmp_path):
    options = [Options(protocol, "smoke", results=tmp_path) for protocol in ("faithful", "corrected")]
    for number, option in enumerate([*options, options[0]]):
        path = write_table(option, "some", f"table {number}")
    text = path.read_text()
    assert "table 0" not in text
    assert text.index("table 2") < text.index("table 1")
    before = path.read_text()
    for option in options:  # anew, the first in the middle of the file
        write_table(option, "some", before.partition(f"begin some {option.label} -->")[2].partition("<!--")[0])
    assert path.read_text() == before


def test_bars_are_of_seeds_or_of_the_one_there_is():
    assert ood._bar([[0.9, 0.8, 0.95]]) == (0.9, 0.8, 0.95)
    assert ood._bar([[0.9, 0.0, 1.0], [0.7, 0.0, 1.0], [0.5, 0.0, 1.0]]) == pytest.approx((0.7, 0.5, 0.9))


def test_numbers_in_tables():
    assert mean_and_sd([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert plus_minus([1.0, 3.0], ".1f") == "2.0 ± 1.4"
    assert plus_minus([2.0], ".1f") == "2.0"
    assert plus_minus([]) == ""


def test_ranges_as_published_and_matched():
    options = Options("corrected", "smoke")
    sets = presented(image_setting(options).problem(0), options)
    assert set(sets) == {
        *(f"{name}, x {scale}" for name in ("inverted", "Gaussian", "uniform") for scale in (1, 20)),
        "noise, matched",
        "inverted, matched",
    }
    assert 0 <= sets["uniform, x 1"].min() < 0.01
    assert 19.9 < sets["uniform, x 20"].max() <= 20
    assert sets["inverted, matched"].abs().max() <= 1


@pytest.mark.data
@pytest.mark.skipif("PYRO_APD_DATA" not in os.environ, reason="PYRO_APD_DATA names no folder of data")
def test_the_five_sets_in_the_authors_ranges():
    problem = image_setting(Options("faithful", "cpu")).problem(0)
    sets = published(problem)
    assert {name: len(x) for name, x in sets.items()} == dict.fromkeys(
        ("notMNIST", "Omniglot", "CIFAR grey", "Gaussian", "uniform"), 2000
    )
    assert sets["notMNIST"].aminmax() == (-0.5, 0.5)
    assert sets["Omniglot"].unique().tolist() == [0.0, 1.0]
    assert sets["Omniglot"].mean().item() == pytest.approx(0.08, abs=0.03)  # about 8 % ink
    assert sets["Gaussian"].max() > 3


def test_chains_of_the_protocols():
    faithful, corrected = (
        image_setting(Options(protocol, "cpu", digits=True)) for protocol in ("faithful", "corrected")
    )
    assert faithful.case.chains.warmup * faithful.case.chains.thinning <= 500
    assert corrected.case is distillation_cases.CASES["digits"]
    assert faithful.case.name != corrected.case.name
    problem = faithful.problem(3)
    start = faithful.kernel(problem, 0).init_strategy(
        {"name": "net.0.weight", "fn": problem.model.priors["net.0.weight"]}
    )
    assert start.abs().max() <= 1 / 8, "PyTorch starts within 1 / sqrt(inputs)"
    assert torch.equal(start, faithful.problem(3).model.net.get_buffer("0.weight"))
