# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import json
import math
import pickle

import numpy as np
import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS

from pyro_apd import uncertainty
from pyro_apd.diagnostics import Fidelity, compare
from pyro_apd.diagnostics.comparison.split import split_draws
from pyro_apd.diagnostics.formatting import format_bytes
from pyro_apd.distillation.source import num_draws_for, split_held_out
from pyro_apd.predictive.draws import evenly_spaced, read_chains
from pyro_apd.predictive.predictive import log_likelihood, outputs

CLASS_METRICS = [
    *("accuracy", "one_draw_accuracy", "nll", "ece", "mean_entropy", "mean_mi"),
    *("mi_correlation", "agreement", "total_variation", "disagreement", "spread", "energy"),
    *("mean_mi[far]", "auroc_entropy[far]", "auroc_mi[far]"),
    *("new_draws", "weight_sd_ratio_5", "weight_sd_ratio_50", "weight_sd_ratio_95"),
]


@pytest.fixture(scope="module")
def run(case):
    def compared(chain, posterior, **options):
        mcmc = case.StubMCMC(chain, case.model)
        return compare(mcmc, posterior, case.model, case.x, case.y, ood=case.ood, **options)

    return compared


def test_both_fine(case, run):
    fidelity = run(case.chain(), case.posterior())
    assert [row.name for row in fidelity.rows] == CLASS_METRICS
    assert fidelity.status == "indistinguishable"
    assert {row.status for row in fidelity.rows} <= {"indistinguishable", "unclear"}
    assert fidelity["mean_mi"].status == "indistinguishable"
    assert fidelity.mixing < 0.1
    assert fidelity["weight_sd_ratio_50"].generator == pytest.approx(1.0, abs=0.1)
    assert fidelity["agreement"].chain > 0.9


def test_collapsed_generator(case, run):
    fidelity = run(case.chain(), case.posterior(sd=0.0))
    assert fidelity.status == "loses"
    assert fidelity["mean_mi"].generator == 0.0
    assert fidelity["mean_mi"].verdict == "loses 100%"
    assert fidelity["mi_correlation"].generator == 0.0
    assert fidelity["auroc_mi[far]"].generator == 0.5
    assert fidelity["weight_sd_ratio_95"].generator == 0.0
    assert "MI" in fidelity.verdict


def test_rounding_is_no_uncertainty(case, run):
    # Networks that are equal but for the last bits, as matrix products of a batch make them.
    fidelity = run(case.chain(), case.posterior(sd=1e-7))
    assert fidelity["mean_mi"].generator == 0.0
    assert fidelity["auroc_mi[far]"].generator == 0.5
    assert fidelity["mi_correlation"].generator == 0.0


def test_collapse_does_not_hide_behind_good_predictions(case, run):
    # One stored network predicts about as well as the average.
    fidelity = run(case.chain(sd=0.15), case.posterior(sd=0.0))
    assert fidelity["accuracy"].status != "loses"
    assert fidelity.status == "loses"


@pytest.mark.slow
@pytest.mark.parametrize(("sd", "words"), [(0.28, "loses"), (0.6, "overstates")])
def test_wrong_spread(case, run, sd, words):
    fidelity = run(case.chain(num_draws=200), case.posterior(sd=sd), num_samples=200)
    assert fidelity.status == "loses"
    assert words in fidelity["mean_mi"].verdict


@pytest.mark.slow
def test_unmixed_chains(case, run):
    chain = case.chain(sd=0.02, spread=1.0)
    pooled = {n: v.flatten(0, 1) for n, v in chain.items()}

    def copy(n):
        index = torch.randint(400, (n,))
        return {name: value[index] for name, value in pooled.items()}

    fidelity = run(chain, case.StubPosterior(copy))
    assert fidelity.status == "unclear"
    assert fidelity.verdict.startswith("Chain too poorly mixed to tell")
    assert fidelity.mixing > 0.5
    collapsed = run(chain, case.StubPosterior(lambda n: {k: v[:1].expand(n, *v.shape[1:]) for k, v in pooled.items()}))
    assert collapsed.status == "unclear"
    assert "loses 100% against these draws" in collapsed["mean_mi"].verdict


def test_a_chain_that_never_moved(case, run):
    fidelity = run(case.chain(sd=0.0), case.posterior(sd=0.0))
    assert fidelity.status == "unclear"
    assert "draws are all the same" in fidelity.verdict


def test_figures_are_those_of_the_draws(case, run):
    chain = case.chain(2, 50)
    fidelity = run(chain, case.posterior(), num_samples=20, seed=5)
    steps = evenly_spaced(50, 10)
    draws = {n: v[:, steps].flatten(0, 1) for n, v in chain.items()}
    probs = outputs(case.model, draws, case.x).probs_SNK
    assert fidelity["accuracy"].chain == pytest.approx((probs.mean(0).argmax(-1) == case.y).double().mean().item())
    assert fidelity["mean_mi"].chain == pytest.approx(uncertainty.mutual_information(probs).mean().item(), rel=1e-5)
    averaged = log_likelihood(case.model, draws, case.x, case.y).double().exp().mean(0).log()
    assert fidelity["nll"].chain == pytest.approx(-averaged.mean().item(), rel=1e-6)
    torch.manual_seed(5)
    drawn = outputs(case.model, case.posterior().get_samples(20), case.x).probs_SNK
    assert fidelity["mean_entropy"].generator == pytest.approx(
        uncertainty.predictive_entropy(drawn).mean().item(), rel=1e-5
    )
    assert torch.allclose(fidelity.per_input["generator"]["mi"], uncertainty.mutual_information(drawn))
    assert fidelity.per_input["chain"]["entropy[far]"].shape == (150,)
    assert torch.equal(fidelity.per_input["targets"]["y"], case.y)


def test_stored_draws_take_the_bytes_of_the_generator(case, run):
    network = 27 * 4
    fidelity = run(case.chain(), case.posterior(num_bytes=5 * network + 3), baselines={})
    assert fidelity.num_stored == 5
    assert fidelity.num_bytes == {
        "chain": 400 * network,
        **{"generator": 5 * network + 3, "stored": 5 * network, "network": network},
    }
    # Five draws know less of mutual information than a hundred.
    assert fidelity["mean_mi"].stored < fidelity["mean_mi"].chain
    assert any("5 stored draws" in note for note in fidelity.notes)


@pytest.mark.slow
def test_stored_draws_are_not_those_they_are_compared_with(case, run):
    chain = read_chains({"a": torch.arange(400.0).reshape(2, 200)}, group_by_chain=True)
    split = split_draws(chain, case.StubPosterior(lambda n: {"a": torch.zeros(n)}, num_bytes=4 * 60), 100, seed=0)
    kept, stored = (set(split.draws[which]["a"].tolist()) for which in ("chain", "stored"))
    assert (len(kept), len(stored), len(kept & stored)) == (100, 60, 0)
    assert sum(value < 200 for value in stored) == 30  # of each chain the same number
    roomy = run(case.chain(1, 200), case.posterior(num_bytes=100 * 27 * 4))
    assert roomy.num_stored == 100
    assert roomy["agreement"].stored < 1.0
    assert not any("look better than they are" in note for note in roomy.notes)
    cramped = run(case.chain(1, 60), case.posterior(num_bytes=1000 * 27 * 4))
    assert cramped.num_stored == 60
    assert any("look better than they are" in note for note in cramped.notes)
    tiny = run(case.chain(1, 60), case.posterior(num_bytes=10))
    assert tiny.num_stored == 0
    assert math.isnan(tiny["nll"].stored)


@pytest.mark.slow
def test_same_seed_same_metrics(case, run):
    first, second, third = (run(case.chain(), case.posterior(), seed=seed) for seed in (1, 1, 2))
    assert first.to_json() == second.to_json() != third.to_json()


def test_global_state_is_left_alone(case, run):
    state = torch.get_rng_state()
    run(case.chain(2, 20), case.posterior())
    assert torch.equal(torch.get_rng_state(), state)


def test_printing_and_serialising(case, run):
    fidelity = run(case.chain(), case.posterior(sd=0.0))
    text = str(fidelity)
    lines = text.splitlines()

    def shown(row):
        return "  =" if row.status == "indistinguishable" else row.verdict

    assert lines[0] == fidelity.verdict
    for row in fidelity.rows:
        assert any(line.startswith(row.label) and line.endswith(shown(row)) for line in lines)
    assert "= indistinguishable at this chain's resolution" in lines
    assert "-- out of distribution: far" in lines
    assert max(map(len, lines[2:])) <= 130
    assert repr(fidelity) == text
    read = json.loads(fidelity.to_json())
    assert read["verdict"] == fidelity.verdict
    assert read["rows"][0]["chain"] == fidelity["accuracy"].chain
    assert "&#x27;" not in fidelity._repr_html_() or "<pre>" in fidelity._repr_html_()
    assert "per_input" not in read
    with pytest.raises(KeyError, match=r"'nix'.*accuracy"):
        fidelity["nix"]


def test_it_is_a_dataframe(case, run):
    fidelity = run(case.chain(), case.posterior(sd=0.0))
    assert isinstance(fidelity, Fidelity)
    assert isinstance(fidelity, pandas.DataFrame)
    assert list(fidelity.index) == CLASS_METRICS
    assert fidelity.loc["mean_mi", "verdict"] == "loses 100%"
    assert fidelity["generator"]["mean_mi"] == 0.0
    assert fidelity["status"]["mean_mi"] == "loses" == fidelity.status
    losses = fidelity[fidelity["status"] == "loses"]
    assert type(losses) is pandas.DataFrame is type(fidelity.to_frame()) is type(fidelity.copy())
    assert 0 < len(losses) < len(fidelity)
    assert fidelity.sort_values("chain").index[0] in CLASS_METRICS
    again = pickle.loads(pickle.dumps(fidelity))
    assert again.verdict == fidelity.verdict
    assert again["mean_mi"] == fidelity["mean_mi"]


def test_json_and_back(case, run):
    fidelity = run(case.chain(), case.posterior(num_bytes=10))
    read = Fidelity.from_json(fidelity.to_json(indent=1))
    assert read.to_json() == fidelity.to_json()
    assert str(read) == str(fidelity)
    pandas.testing.assert_frame_equal(read.to_frame(), fidelity.to_frame())
    assert math.isnan(read["mean_mi"].stored)
    assert read.per_input == {}
    for text in ("{}", "[1]", "no JSON", '{"rows": [{"name": "mean_mi"}]}'):
        with pytest.raises(ValueError, match=r"not what Fidelity\.to_json"):
            Fidelity.from_json(text)


@pytest.mark.slow
def test_memorised_draws(case, run):
    chain = case.chain()
    pooled = {n: v.flatten(0, 1) for n, v in chain.items()}

    def of(number, noise):
        def sample(n):
            index = torch.randint(number, (n,))
            return {name: v[index] + noise * torch.randn(n, *v.shape[1:]) for name, v in pooled.items()}

        return case.StubPosterior(sample)

    for number in (400, 20):  # all draws of the chain, and few
        fidelity = run(chain, of(number, 0.004))
        assert fidelity["new_draws"].generator == 0.0
        assert fidelity["new_draws"].verdict == "loses 1"
        assert fidelity.status == "loses"
    # A posterior that says so is judged by what it predicts.
    repeats = of(400, 0.004)
    repeats.metadata["distinct_draws"] = 400
    fidelity = run(chain, repeats)
    assert fidelity["new_draws"].verdict == "repeats networks, as it says"
    assert fidelity.status == "indistinguishable"
    assert "The generator repeats 400 networks, apart from noise, as its metadata say." in fidelity.notes
    # As far from the draws as these are from each other: no copies.
    assert run(chain, of(400, 0.4))["new_draws"].generator == 1.0


def test_draws_that_repeat_themselves_are_no_news_though_not_the_chains(case, run):
    few = {n: v.flatten(0, 1)[:15] for n, v in case.chain(seed=9).items()}

    def sample(n):
        index = torch.randint(15, (n,))
        return {name: v[index] for name, v in few.items()}

    assert run(case.chain(), case.StubPosterior(sample))["new_draws"].generator < 0.05


def test_a_slow_chain_is_no_copy_of_itself(case, run):
    fidelity = run(case.chain(a=0.97, num_draws=300), case.posterior())
    assert fidelity["new_draws"].chain > 0.9
    assert fidelity["new_draws"].generator > 0.9


def test_json_has_no_nan(case):
    fidelity = compare(case.chain(1, 30), case.posterior(num_bytes=10), group_by_chain=True)
    assert json.loads(fidelity.to_json())["rows"][0]["stored"] is None


def test_one_stored_draw_has_no_spread(case):
    fidelity = compare(case.chain(1, 30), case.posterior(num_bytes=27 * 4 + 3), group_by_chain=True)
    assert fidelity.num_stored == 1
    assert math.isnan(fidelity["weight_sd_ratio_50"].stored)
    assert any("than 1 stored draw of the same size" in note for note in fidelity.notes)


@pytest.mark.parametrize(("size", "words"), [(12, "12 B"), (3170, "3.17 kB"), (2.5e6, "2.5 MB"), (4e9, "4 GB")])
def test_bytes_in_words(size, words):
    assert format_bytes(size) == words


@pytest.mark.slow
def test_regression(case):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=g)
    y = x @ torch.tensor([1.0, -2.0]) + 0.3 * torch.randn(60, generator=g)

    def draws(n, sd):
        centre = torch.tensor([1.0, -2.0])
        return {
            "weight": centre + sd * torch.randn(n, 2, generator=g),
            "scale": 0.3 * torch.exp(0.1 * torch.randn(n, generator=g)),
        }

    options = {"model": case.regression, "x": x, "y": y, "ood": {"far": 5 * x}, "num_samples": 400}
    good = compare(draws(400, 0.1), draws(400, 0.1), **options)
    assert [row.name for row in good.rows if row.group not in ("memory", "weight space")] == [
        *("rmse", "nll", "mean_sd", "mean_epistemic", "epistemic_correlation", "mean_shift"),
        *("disagreement", "spread", "energy"),
        *("mean_epistemic[far]", "auroc_sd[far]", "auroc_epistemic[far]"),
    ]
    assert good.status == "indistinguishable"
    assert good["mean_epistemic"].chain == pytest.approx(0.01 * (x**2).sum(-1).mean().item(), rel=0.3)
    variance = 0.09 * math.exp(2 * 0.1**2) + good.per_input["chain"]["epistemic"]
    assert good["mean_sd"].chain == pytest.approx(variance.sqrt().mean().item(), rel=0.02)
    assert good["mean_epistemic[far]"].chain == pytest.approx(25 * good["mean_epistemic"].chain, rel=1e-3)
    collapsed = compare(draws(400, 0.1), draws(400, 0.0), **options)
    assert collapsed.status == "loses"
    assert collapsed["mean_epistemic"].verdict == "loses 100%"
    shifted = draws(400, 0.1)
    shifted["weight"] = shifted["weight"] + 0.2
    assert compare(draws(400, 0.1), shifted, **options)["mean_shift"].status == "loses"


def test_binary_labels(case):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    x = torch.randn(50, 2)
    y = (x[:, 0] > 0).float()
    draws = {"w": torch.tensor([2.0, 0.0]) + 0.3 * torch.randn(80, 2)}
    fidelity = compare(draws, draws, model, x, y)
    assert fidelity["accuracy"].chain > 0.8
    assert fidelity["mean_entropy"].chain < math.log(2)


def test_a_model_that_insists_on_targets(case):
    def model(x, y):
        return case.regression(x, y)

    draws = {"weight": torch.randn(80, 2), "scale": torch.ones(80)}
    x = torch.randn(20, 2)
    insisting, lenient = (compare(draws, draws, m, x, x.sum(-1), ood={"far": 2 * x}) for m in (model, case.regression))
    assert insisting.to_json() == lenient.to_json()


def test_one_hot_labels(case):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.OneHotCategorical(logits=x @ w.T), obs=y)

    x = torch.randn(50, 2)
    y = torch.nn.functional.one_hot((x[:, 0] > 0).long(), 3).float()
    draws = {"w": 0.3 * torch.randn(80, 3, 2) + torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 0.0]])}
    assert compare(draws, draws, model, x, y)["accuracy"].chain > 0.8


def test_without_targets_there_is_no_accuracy(case):
    fidelity = compare(case.StubMCMC(case.chain(), case.model), case.posterior(), x=case.x)
    names = {row.name for row in fidelity.rows}
    assert not names & {"accuracy", "one_draw_accuracy", "nll", "ece"}
    assert "mean_mi" in names


def test_without_inputs_weights_alone_are_compared(case):
    fidelity = compare(case.chain(), case.posterior(sd=0.2))
    assert [row.group for row in fidelity.rows] == ["memory"] + ["weight space"] * 3
    assert fidelity["new_draws"].status == "indistinguishable"  # so it was the weights that decided
    assert fidelity.status == "loses"
    assert math.isnan(fidelity.mixing)
    assert any("unidentified" in note for note in fidelity.notes)


@pytest.mark.slow
def test_nuts_on_its_own_data(case):
    x = torch.randn(25, 2)
    y = x @ torch.tensor([1.0, -1.0]) + 0.3 * torch.randn(25)
    mcmc = MCMC(NUTS(case.regression), num_samples=40, warmup_steps=30, disable_progbar=True)
    mcmc.run(x, y)
    fidelity = compare(mcmc, mcmc.get_samples())
    assert {"nll", "mean_epistemic"} <= {row.name for row in fidelity.rows}
    assert fidelity.chain_name == "NUTS"
    assert fidelity["new_draws"].generator == 0.0  # a dict of its own draws is memorised
    assert fidelity["new_draws"].verdict.startswith("loses")
    assert any("conditioned on" in note for note in fidelity.notes)
    assert any(note.startswith("One chain") for note in fidelity.notes)


def test_errors_say_what_came(case):
    mcmc, posterior = case.StubMCMC(case.chain(), case.model), case.posterior()
    with pytest.raises(ValueError, match=r"num_samples=4 must be an integer >= 8"):
        compare(mcmc, posterior, x=case.x, num_samples=4)
    with pytest.raises(ValueError, match="At least 8 draws"):
        compare(case.chain(1, 5), posterior, group_by_chain=True)
    with pytest.raises(ValueError, match="need `x`"):
        compare(mcmc, posterior, y=case.y)
    with pytest.raises(ValueError, match=r"`model` must be a Pyro model.*got shape \(150"):
        compare(case.chain(), case.posterior(), case.x, case.model)
    with pytest.raises(ValueError, match="pass `model`"):
        compare(case.chain(), posterior, x=case.x)
    with pytest.raises(ValueError, match=r"`y` has 149 entries.*150"):
        compare(mcmc, posterior, x=case.x, y=torch.cat([case.y, case.y])[:149])
    with pytest.raises(ValueError, match="of one model"):
        compare(mcmc, {"other": torch.zeros(50, 2)})
    with pytest.raises(TypeError, match="int"):
        compare(3, posterior)
    draws = {name: value.flatten(0, 1) for name, value in case.chain().items()}
    for changes, message in [
        ({"posterior": {"w": np.zeros(9)}}, r"`posterior\['w'\]` must be a tensor .* got ndarray"),
        ({"posterior": {name: None for name in draws}}, "got NoneType"),
        ({"posterior": torch.zeros(3)}, "Tensor"),
        (
            {"mcmc": {name: value[:, None] for name, value in draws.items()}, "group_by_chain": False},
            "has another shape",
        ),
        ({"x": case.x.numpy()}, "`x` must be a tensor of inputs .* got ndarray"),
        ({"x": case.x[:0]}, r"`x` must be a tensor of inputs .* got shape \(0, 2\)"),
        ({"x": case.x, "y": case.y.tolist()}, "`y` must be a tensor of targets.*got list"),
        ({"x": case.x, "ood": case.x}, "`ood` must be a dict of inputs"),
        ({"x": case.x, "ood": {"far": None}}, r"`ood\['far'\]` must be a tensor"),
        ({"seed": "a"}, "seed"),
        ({"num_samples": 8.5}, "num_samples=8.5 must be an integer"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            compare(**{"mcmc": draws, "posterior": draws, "model": case.model, **changes})


def test_draws_of_a_dict_are_taken_of_all_chains():
    """Chains follow each other in a dict, whose first draws are all of one chain; the order must not decide."""
    values = torch.arange(40.0).reshape(4, 10, 1)
    pooled = {"w": values.flatten(0, 1)}
    split = split_draws(read_chains({"w": values}, group_by_chain=True), pooled, 8, None)
    assert split.draws["generator"]["w"].flatten().tolist() == [2, 7, 12, 17, 22, 27, 32, 37]
    assert split.draws["chain"]["w"].flatten().tolist() == split.draws["generator"]["w"].flatten().tolist()


def test_the_chain_column_is_of_draws_that_were_held_out():
    from types import SimpleNamespace

    from pyro_apd.diagnostics.comparison.split import held_out_steps, split_draws
    from pyro_apd.predictive.chain_draws import ChainDraws

    values = torch.arange(200.0).reshape(2, 100, 1)
    chain = ChainDraws({"w": values})
    rule = {"period": 25, "start": 10, "length": 5}
    metadata = {"num_chains": 2, "num_draws": 100, "held_out": rule}
    posterior = SimpleNamespace(
        metadata=metadata, num_bytes=40, get_samples=lambda n, **settings: {"w": torch.zeros(n, 1)}
    )
    unseen = [step for step in range(100) if step % 25 in (10, 11, 12, 13, 14)]
    assert held_out_steps(chain, posterior) == unseen
    split = split_draws(chain, posterior, 40, None)
    assert split.draws["chain"]["w"].flatten().tolist() == [float(c * 100 + s) for c in (0, 1) for s in unseen]
    assert not split.is_fitted
    assert set(split.draws["stored"]["w"].flatten().tolist()).isdisjoint(split.draws["chain"]["w"].flatten().tolist())
    # More draws than were held out, or another chain than the one distilled: all draws, and a note that says so.
    assert split_draws(chain, posterior, 60, None).is_fitted
    assert [num_draws_for(count) for count in (1, 5, 6, 20)] == [25, 25, 50, 100]
    assert all(len(split_held_out(num_draws_for(count))[1]) >= count for count in (1, 5, 6, 20))
    posterior.metadata = {**metadata, "num_draws": 99}
    assert held_out_steps(chain, posterior) == []


def test_baselines_are_columns_that_do_not_change_the_rest(case, run):
    pooled = {name: value.flatten(0, 1) for name, value in case.chain(seed=4).items()}
    few = {name: value[:3] for name, value in pooled.items()}
    baselines = {"int2": few, "wide": case.posterior(sd=0.6)}
    alone, fidelity = (run(case.chain(), case.posterior(), num_samples=20, baselines=b) for b in ({}, baselines))
    assert list(fidelity.columns) == [*alone.columns, "int2", "wide"]
    assert fidelity.baselines == ["int2", "wide"]
    assert fidelity.verdict == alone.verdict
    for name in alone.columns[2:6]:
        assert np.allclose(fidelity[name], alone[name], atol=1e-6, equal_nan=True), name
    probs = outputs(case.model, few, case.x).probs_SNK
    assert fidelity["mean_mi"].baselines["int2"] == fidelity["int2"]["mean_mi"]
    assert fidelity["int2"]["mean_mi"] == pytest.approx(uncertainty.mutual_information(probs).mean().item(), rel=1e-5)
    assert fidelity["wide"]["mean_mi"] > fidelity["mean_mi"].chain
    header, first = (str(fidelity).splitlines()[i] for i in (2, 4))
    assert header.split()[-4:] == ["int2", "wide", "resolution", "verdict"]
    assert first.split()[5] == f"{fidelity['accuracy'].baselines['wide']:.4f}"
    assert any("closer to the chain than int2 (3 draws) in " in note for note in fidelity.notes)
    assert {"int2": 3 * 27 * 4, **alone.num_bytes}.items() <= fidelity.num_bytes.items()
    read = Fidelity.from_json(fidelity.to_json())
    assert str(read) == str(fidelity)
    pandas.testing.assert_frame_equal(read.to_frame(), fidelity.to_frame())


def test_the_strongest_baseline_stands_beside_the_generator(case, run):
    generator = case.posterior(num_bytes=20 * 27 * 4)
    fidelity = run(case.chain(), generator, num_samples=20)
    assert fidelity.baselines == ["int2"]
    assert 0 < fidelity.num_bytes["int2"] <= generator.num_bytes
    assert any("closer to the chain than int2" in note for note in fidelity.notes)
    assert run(case.chain(), generator, num_samples=20, baselines={}).baselines == []
    # Not one draw fits; draws in place of a generator; nothing is known of the model.
    assert run(case.chain(), case.posterior(num_bytes=10), num_samples=20).baselines == []
    pooled = {name: value.flatten(0, 1) for name, value in case.chain(seed=4).items()}
    assert run(case.chain(), pooled, num_samples=20).baselines == []


def test_baselines_must_be_draws_of_the_same_model(case, run):
    few = {name: value.flatten(0, 1)[:3] for name, value in case.chain().items()}
    for baselines, error, message in [
        ([few], TypeError, "`baselines` must be a dict of draws or posteriors by name; got list"),
        ({"stored": few}, ValueError, "must be a string other than label, .*; got 'stored'"),
        ({3: few}, ValueError, "got 3"),
        ({"int2": {"w": torch.zeros(2)}}, ValueError, r"Sites of `baselines\['int2'\]` \['w'\]"),
        ({"int2": {name: value[..., :1] for name, value in few.items()}}, ValueError, "has another shape"),
        ({"int2": 3}, TypeError, r"baselines\['int2'\]"),
    ]:
        with pytest.raises(error, match=message):
            run(case.chain(), case.posterior(), baselines=baselines)
