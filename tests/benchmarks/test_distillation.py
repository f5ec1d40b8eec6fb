# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The rig of ``benchmarks.distillation``: its figures on sets made by hand, and that it runs."""

import dataclasses
import json

import pytest
import torch

from benchmarks import common, distillation, distillation_cases
from benchmarks.distillation_figure import frontier
from benchmarks.distillation_methods import Material, flow_matching, ours, stored
from benchmarks.distillation_tables import summary
from benchmarks.distillation_targets import at_equal_bytes, level, measures, targets
from pyro_apd.models.layout import Layout

NUM_DRAWS = 20


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Few draws, few methods, a chain of a second, and nothing written outside of a folder of the test's own."""
    case = distillation_cases.CASES["toy"]
    chains = dataclasses.replace(case.chains, thinning=20)
    monkeypatch.setitem(distillation_cases.CASES, "toy", dataclasses.replace(case, chains=chains, networks=(4,)))
    monkeypatch.setattr(distillation_cases, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(distillation, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(distillation, "NUM_DRAWS", NUM_DRAWS)
    few = {name: distillation.METHODS[name] for name in ("stored, thinned", "int8, thinned")}
    monkeypatch.setattr(distillation, "METHODS", few)
    monkeypatch.setattr(distillation, "FIXED", {"mean field": distillation.FIXED["mean field"]})
    return tmp_path


def run(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["distillation", "--data", "toy", *args])
    distillation.main()


@pytest.mark.slow
def test_it_runs_quickly_and_stores_nothing(small, monkeypatch, capsys):
    run(monkeypatch, "--quick")
    whole, _, summary = capsys.readouterr().out.partition("#### ")
    rows = {line.split("|")[1].strip(): line for line in whole.splitlines() if line.startswith("| ")}
    assert "| int8, thinned, 4 |" in summary
    assert list(rows) == [
        "method", "---", "held-out SGLD", "other draws", "int8, thinned, 4", "stored, thinned, 4",
        "mean field",
    ]  # fmt: skip
    header = [cell.strip() for cell in rows["method"].split("|")[1:-1]]
    for name in ("networks", "accuracy", "one draw accuracy", "nll", "ece", "mi", "agreement", "TV", "nearest"):
        assert name in header
    cells = dict(zip(header, (cell.strip() for cell in rows["stored, thinned, 4"].split("|")[1:-1]), strict=True))
    # Copies, four of them, of four networks' bytes.
    assert (cells["networks"], cells["nearest"], cells["support"]) == ("4.00", "0.00", "4")
    assert [path.name for path in small.iterdir()] == ["cache"]
    # A second run finds its chain there.
    monkeypatch.setattr(distillation_cases, "MCMC", None)
    run(monkeypatch, "--quick", "--rows", "validation", "--methods", "mean")
    assert "stored, thinned" not in capsys.readouterr().out


def test_copies_are_near_and_independent_draws_are_not():
    train_ND, held_ND, fresh_ND = torch.randn(3, 300, 40)
    copies = distillation.novelty(train_ND, held_ND, train_ND[:100])
    assert (copies["nearest"], copies["support"]) == (0.0, 4950)  # as many pairs as there are, none the same
    fresh = distillation.novelty(train_ND, held_ND, fresh_ND[:100])
    assert fresh["nearest"] == pytest.approx(1.0, abs=0.05)
    assert fresh["support"] == 4950


@pytest.mark.parametrize("support", [5, 20, 50])
def test_the_birthday_paradox_counts_networks(support):
    """A hundred draws of a few: pairs that are the same, of all pairs, are one in so many."""
    train_ND, held_ND = torch.randn(2, 300, 40)
    few_KD = torch.randn(support, 40)
    found = [
        distillation.novelty(train_ND, held_ND, few_KD[torch.randint(support, (100,))])["support"] for _ in range(8)
    ]
    assert sum(found) / 8 == pytest.approx(support, rel=0.25)


def test_evenly_repeated_networks_are_counted_exactly():
    train_ND, held_ND = torch.randn(2, 300, 40)
    theta_SD = torch.randn(4, 40).repeat(25, 1)
    pairs, same = 100 * 99 // 2, 4 * 25 * 24 // 2
    assert distillation.novelty(train_ND, held_ND, theta_SD)["support"] == pairs / same


def test_of_stored_draws_the_support_is_their_number():
    train_ND, held_ND = torch.randn(2, 300, 40)
    found = distillation.novelty(train_ND, held_ND, train_ND[:8])
    assert (found["nearest"], found["support"]) == (0.0, 8.0)


def test_draws_of_many_bytes_are_split_into_files(monkeypatch, tmp_path):
    theta_CSD = torch.randn(2, 25, 7)
    whole = distillation_cases.split(theta_CSD, tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(distillation_cases, "_IN_MEMORY", 0)
    for _ in range(2):  # written, and read again
        parts = distillation_cases.split(theta_CSD, tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["fitted.npy", "held_out.npy"]
        for part, other in zip(parts, whole, strict=True):
            assert torch.equal(part, other)


def test_no_method_of_the_largest_case_needs_all_draws_in_memory():
    without = distillation_cases.CASES["mlp10m"].without
    left = [name for name in (*distillation.METHODS, *distillation.FIXED) if not name.startswith(without)]
    assert left == ["generator"]


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_predictions_of_blocks_are_those_of_all_draws(at_once, monkeypatch):
    problem = distillation_cases.toy(0)
    net = distillation_cases.network(2, 10, 10, 2)
    layout = Layout({f"net.{name}": tuple(value.shape) for name, value in net.named_parameters()})
    theta_ND = torch.randn(10, layout.size, generator=torch.Generator().manual_seed(0))
    one = distillation.predictions(problem, layout, [theta_ND], "test")
    other = distillation.predictions(problem, layout, theta_ND.split(at_once), "test")
    assert torch.equal(other.theta_SD, one.theta_SD)
    for name, value in one.values.items():
        torch.testing.assert_close(other.values[name], value)
    assert other.metrics() == pytest.approx(one.metrics(), rel=1e-4)
    monkeypatch.setattr(distillation, "MAX_WEIGHTS", 50)
    few = distillation.predictions(problem, layout, theta_ND.split(at_once), "test")
    assert few.theta_SD.shape[1] <= 50


def test_novelty_has_the_units_of_each_weight():
    train_ND, held_ND, theta_SD = torch.randn(3, 300, 40)
    scale_D, shift_D = torch.logspace(-3, 3, 40), 100 * torch.randn(40)
    plain = distillation.novelty(train_ND, held_ND, theta_SD[:100])
    scaled = distillation.novelty(*(shift_D + scale_D * value for value in (train_ND, held_ND, theta_SD[:100])))
    assert scaled["nearest"] == pytest.approx(plain["nearest"], rel=1e-2)


def material(size=1000, num_draws=80):
    problem = type("P", (), {"train": (torch.zeros(3, 1),), "model": None})
    return Material(problem, Layout({"w": (size,)}), torch.randn(1, num_draws, size), 0)


def test_draws_in_fewer_bits_fill_the_same_bytes():
    source = material()
    of_floats, of_bytes = stored("float32")(source, 4), stored("int8")(source, 4)
    assert (of_floats.num_bytes, len(of_floats.sample(0))) == (4 * 1000 * 4, 4)
    assert (of_bytes.num_bytes, len(of_bytes.sample(0))) == (15 * (1000 + 2), 15)


def test_too_few_bytes_are_no_method():
    source = material()
    assert stored("float32")(source, 3.9) is None
    assert stored("int8")(source, 0.1) is None
    assert ours(source, 1e-3) is None
    assert flow_matching(source, 2) is None


def test_the_rig_fits_no_method_to_what_is_held_out():
    theta_CSD = torch.arange(40.0).reshape(1, 40, 1)
    train_CTD, held_CHD = distillation_cases.split(theta_CSD)
    assert held_CHD.flatten().tolist() == [8, 9, 18, 19, 28, 29, 38, 39]
    assert sorted([*train_CTD.flatten().tolist(), *held_CHD.flatten().tolist()]) == list(range(40))


def run_of(networks, nll=0.2, mi=0.1, by_input=0.99, ood=0.5, seconds=1.0, tv=0.004):
    return {
        "nll": nll, "mean_mi": mi, "mean_mi[far]": ood, "auroc_mi[far]": 0.9, "mi_correlation": by_input,
        "total_variation": tv, "networks": networks, "seconds": seconds,
    }  # fmt: skip


def test_targets_are_met_or_missed():
    stored_runs = {
        "held-out SGLD": run_of(0, by_input=1.0),
        "other draws": run_of(0),
        "generator, 4": run_of(4.0, mi=0.2),
        "generator, 5": run_of(4.9),
        "generator, 8": run_of(8.0),
    }
    case = distillation_cases.CASES["digits"]
    *_, row, _, verdict = targets(case, {"0": stored_runs}).splitlines()
    assert row.split("|")[2].strip() == "generator, 5"
    assert row.split("|")[-2].strip() == "met"
    assert verdict == "* digits, <= 5 networks: met"
    # Means over seeds count: an error of the other sign is balanced, and seconds are not.
    second = {**stored_runs, "generator, 5": run_of(4.9, nll=0.202, seconds=9.0)}
    *_, row, _, verdict = targets(case, {"0": stored_runs, "1": second}).splitlines()
    assert "+0.50 (1) met" in row
    assert "5.0 (3) missed" in row
    assert row.split("|")[-2].strip() == "missed 1"
    assert verdict == "* digits, <= 5 networks: fit, CPU s 5.0 (3) missed"
    assert "| none |" in targets(case, {"0": {name: stored_runs[name] for name in ("held-out SGLD", "other draws")}})


def test_of_several_sets_the_worst_counts():
    reference = {**run_of(0, by_input=1.0), "mean_mi[near]": 0.4}
    other = {**run_of(1.0, ood=0.51), "mean_mi[near]": 0.38}
    assert measures("x", {"0": {"held-out SGLD": reference, "x": other}})["ood"] == pytest.approx(-5.0)


def test_the_generator_is_compared_with_the_best_stored_draws_of_its_bytes():
    stored_runs = {
        "held-out SGLD": run_of(0, by_input=1.0),
        "generator, 2": run_of(2.0, nll=0.201, by_input=0.98, tv=0.005),
        "int2, error feedback, 2": run_of(2.0, nll=0.21, mi=0.101, by_input=0.97, tv=0.006),
        "int3, error feedback, 2": run_of(2.0, nll=0.19, mi=0.11, by_input=0.99, tv=0.007),
        "int3, error feedback, 4": run_of(4.0),
    }
    lines = at_equal_bytes(distillation_cases.CASES["mnist"], {"0": stored_runs}).splitlines()
    assert len(lines) == 8
    cells = [cell.strip() for cell in lines[5].split("|")[1:-1]]
    assert cells == [
        "2", "+0.5; +5.0 (int2)", "+0.0; +1.0 (int2)", "0.9800; 0.9900 (int3)", "0.0050; 0.0060 (int2)", "3 of 4", "0",
    ]  # fmt: skip
    assert lines[-1] == (
        "Error-feedback draws are level from this many networks on: NLL not up to 2, MI or variance not up to 2, "
        "input by input 2, prediction not up to 2."
    )


def test_stored_draws_are_level_where_they_stay_as_near_as_the_generator_or_the_chain():
    """Nearer at 1.5 and not at 2 is not level; as near as other draws of the chain is."""
    reference, others = run_of(0, by_input=1.0, tv=0.0), run_of(0, by_input=0.98, tv=0.004)
    stored_runs = {"held-out SGLD": reference, "other draws": others}
    for networks, generator, bits in ((1.5, 0.90, 0.91), (2, 0.99, 0.95), (4, 0.99, 0.981), (8, 0.99, 0.992)):
        stored_runs[f"generator, {networks:g}"] = run_of(networks, by_input=generator, tv=0.005)
        stored_runs[f"int2, error feedback, {networks:g}"] = run_of(networks, by_input=bits, tv=0.006)
    case = distillation_cases.CASES["mnist"]
    assert level(case, {"0": stored_runs}) == (
        "Error-feedback draws are level from this many networks on: NLL 1.5, MI or variance 1.5, input by input 4, "
        "prediction not up to 8."
    )
    # Only seeds that have both are compared.
    far = {"held-out SGLD": reference, "other draws": others, "generator, 8": run_of(8, by_input=0.1)}
    assert level(case, {"0": stored_runs, "1": far}) == level(case, {"0": stored_runs})


def test_tables_are_in_one_order_and_name_seeds_that_are_not_all():
    runs = {"held-out SGLD": run_of(0, by_input=1.0), "generator, 12": run_of(12), "generator, 2": run_of(2)}
    second = {"held-out SGLD": runs["held-out SGLD"], "default": run_of(1), "other draws": run_of(0)}
    lines = summary(distillation_cases.CASES["mnist"], {"0": runs, "1": second}).splitlines()[5:]
    assert [line.split("|")[1].strip() for line in lines] == [
        "other draws (seed 1)", "default (seed 1)", "generator, 2 (seed 0)", "generator, 12 (seed 0)",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_figure_has_a_panel_for_each_network(tmp_path):
    reference = {"held-out SGLD": run_of(0, by_input=1.0), "other draws": run_of(0)}
    frontier(tmp_path)
    assert not list(tmp_path.iterdir())
    for name in ("toy", "mnist"):
        runs = {**reference, "generator, 1": run_of(1.0), "generator, 2": run_of(2.0, by_input=0.995)}
        (tmp_path / f"distillation_{name}.json").write_text(json.dumps({"0": runs}))
    frontier(tmp_path)
    assert (tmp_path / "distillation_frontier.png").stat().st_size > 10_000


@pytest.mark.slow
def test_results_are_stored_with_a_figure_and_not_run_again(small, monkeypatch, capsys):
    sample = distillation_cases.Case.sample
    monkeypatch.setattr(
        distillation_cases.Case, "sample", lambda case, problem, seed, quick: sample(case, problem, seed, True)
    )
    run(monkeypatch, "--seeds", "0", "--methods", "stored, thinned")
    stored = json.loads((small / "distillation_toy.json").read_text())["0"]
    assert list(stored) == ["held-out SGLD", "other draws", "stored, thinned, 4"]
    assert stored["stored, thinned, 4"]["bytes"] == 4 * 4 * (2 * 10 + 10 + 10 * 10 + 10 + 10 * 2 + 2)
    assert (small / "distillation_frontier.png").stat().st_size > 10_000
    monkeypatch.setitem(distillation.METHODS, "stored, thinned", None)  # it would fail if it were called
    run(monkeypatch, "--seeds", "0")
    again = json.loads((small / "distillation_toy.json").read_text())["0"]
    assert again["stored, thinned, 4"] == stored["stored, thinned, 4"]
    assert list(again)[3:] == ["int8, thinned, 4", "mean field"]
    assert "mean field" in capsys.readouterr().out
