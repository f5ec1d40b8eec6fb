# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from pyro_apd import metrics
from pyro_apd.diagnostics import compare, plots
from pyro_apd.diagnostics.mixing.convergence import statistics


@pytest.fixture(autouse=True)
def _no_pyplot(monkeypatch):
    """A plot that reached for pyplot would leave figures open."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)


@pytest.fixture(scope="module")
def fidelity(case):
    mcmc = case.StubMCMC(case.chain(), case.model)
    return compare(mcmc, case.posterior(), x=case.x, y=case.y, ood=case.ood)


def offsets(ax, which=0):
    return np.asarray(ax.collections[which].get_offsets())


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def area(x, y):
    """Below a line."""
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum())


def rendered(ax):
    """Draws for real, so that a bad limit or label shows."""
    ax.figure.savefig("/dev/null", format="png", dpi=30)
    return ax


def test_scatter_shows_each_input():
    chain, generator = torch.rand(50), torch.rand(50)
    ax = rendered(plots.score_scatter(chain, generator, names=("NUTS", "generator")))
    np.testing.assert_allclose(offsets(ax), torch.stack([chain, generator], 1), rtol=1e-6)
    assert ax.get_xlabel() == "mutual information (nats), NUTS"
    assert ax.get_xlim() == ax.get_ylim()


def test_scatter_of_a_collapsed_generator_and_of_many_inputs():
    ax = rendered(plots.score_scatter(torch.rand(50), torch.zeros(50)))
    assert (offsets(ax)[:, 1] == 0).all()
    rendered(plots.score_scatter(torch.zeros(5), torch.zeros(5)))
    assert len(offsets(plots.score_scatter(torch.rand(9000), torch.rand(9000)))) == 4000


def test_histograms_have_unit_area_and_name_their_sets():
    inside, outside = torch.rand(500), {"noise": 1 + torch.rand(300), "letters": torch.rand(200)}
    ax = rendered(plots.score_histograms(inside, outside, upper=2.5, title="SGLD"))
    assert labels(ax) == ["in distribution", "noise", "letters"]
    width = 2.5 / 30
    assert sum(patch.get_height() for patch in ax.patches) * width == pytest.approx(1.0)
    for line in ax.lines:
        assert sum(line.get_ydata()[:-1]) * width == pytest.approx(1.0)
    assert len({line.get_linestyle() for line in ax.lines}) == 2
    assert ax.get_title() == "SGLD"


def test_scores_beyond_the_axis_are_not_dropped():
    ax = plots.score_histograms(torch.tensor([0.1, 9.0]), {}, upper=1.0)
    assert ax.patches[-1].get_height() / 30 == pytest.approx(0.5)


def test_calibration_curve():
    probs = torch.tensor([[0.9, 0.1]] * 10 + [[0.35, 0.65]] * 10)
    labels_N = torch.tensor([0] * 9 + [1] + [1] * 5 + [0] * 5)
    ax = rendered(plots.calibration_curve({"SGLD": probs, "generator": probs}, labels_N))
    x, y = ax.lines[1].get_data()
    np.testing.assert_allclose(x, [0.65, 0.9], rtol=1e-6)
    np.testing.assert_allclose(y, [0.5, 0.9])
    assert labels(ax) == ["calibrated", "SGLD (ECE 0.075)", "generator (ECE 0.075)"]
    few = plots.calibration_curve({"SGLD": probs[:4]}, labels_N[:4])
    assert len(few.lines[1].get_xdata()) == 0


@pytest.mark.slow
def test_weight_sd():
    chain = torch.randn(50, 30)
    ax = rendered(plots.weight_sd(chain, 0.5 * chain))
    np.testing.assert_allclose(offsets(ax)[:, 1], 0.5 * offsets(ax)[:, 0], rtol=1e-5)
    assert ax.get_xscale() == "linear"
    collapsed = rendered(plots.weight_sd(chain, torch.zeros_like(chain)))
    assert labels(collapsed)[1] == "one weight (100% have no spread)"
    wide = rendered(plots.weight_sd(chain * torch.logspace(-3, 0, 30), torch.zeros_like(chain)))
    assert wide.get_xscale() == wide.get_yscale() == "log"
    rendered(plots.weight_sd(torch.zeros(5, 3), torch.zeros(5, 3)))


def test_principal_pair_does_not_shrink_a_perfect_generator():
    # More weights than draws: in components of one half, the other looks small.
    chain, generator = torch.randn(60, 500), torch.randn(80, 500)
    ax = rendered(plots.principal_pair(chain, generator))
    spread = [offsets(ax, which).std(0) for which in (0, 1)]
    np.testing.assert_allclose(spread[0], spread[1], rtol=0.5)
    assert len(offsets(ax, 0)) == len(offsets(ax, 1)) == 60
    assert labels(ax) == ["SGLD", "generator"]


def test_principal_pair_keeps_distances():
    theta = torch.randn(40, 2, dtype=torch.float64)
    ax = plots.principal_pair(theta, theta + 5)
    points = np.concatenate([offsets(ax, 0), offsets(ax, 1)])
    np.testing.assert_allclose(
        np.linalg.norm(points[0] - points[50]), float((theta[0] - theta[10] - 5).norm()), rtol=1e-6
    )
    np.testing.assert_allclose(points.mean(0), 0, atol=1e-9)
    rendered(plots.principal_pair(theta, torch.zeros_like(theta)))


def test_trace():
    values = torch.randn(8, 20)
    ax = rendered(plots.trace(values))
    np.testing.assert_allclose(ax.lines[3].get_ydata(), values[3], rtol=1e-6)
    styles = {(line.get_color(), line.get_linestyle()) for line in ax.lines}
    assert len(styles) == 8
    assert labels(ax) == ["SGLD, 8 chains"]


def test_training_curves():
    log = {"steps": [0, 10, 20], "critic_loss": [3.0, 2.0, 1.0], "short": [1.0], "kind": ["a"], "empty": []}
    axes = plots.training_curves(log)
    assert [ax.get_title() for ax in axes] == ["critic loss", "short"]
    np.testing.assert_array_equal(axes[0].lines[0].get_data(), [[0, 10, 20], [3, 2, 1]])
    assert axes[0].get_xlabel() == "step"
    rendered(axes[0])
    own = Figure().subplots(1, 2)
    assert plots.training_curves(log, own) == list(own)
    with pytest.raises(ValueError, match="must be 2"):
        plots.training_curves(log, own[:1])
    with pytest.raises(ValueError, match="no series"):
        plots.training_curves({"kind": ["a"], "step": [1]})


@pytest.mark.slow
def test_quality_against_bytes(fidelity):
    ax = rendered(plots.quality_against_bytes(fidelity, "mean_mi"))
    points = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines[1:]}
    row, size = fidelity["mean_mi"], fidelity.num_bytes
    assert points["SGLD, all draws"] == (size["chain"], row.chain)
    assert points["generator"] == (size["generator"], row.generator)
    assert points["8 stored draws"] == (size["stored"], row.stored)
    with pytest.raises(KeyError, match="nix"):
        plots.quality_against_bytes(fidelity, "nix")


def test_given_axes_are_used_and_dark_ones_get_light_colours(fidelity):
    light, dark = Figure().subplots(1, 2)
    dark.set_facecolor("#1d2025")
    chain, generator = (fidelity.per_input[side]["mi"] for side in ("chain", "generator"))
    assert plots.score_scatter(chain, generator, light) is light
    plots.score_scatter(chain, generator, dark)
    assert light.collections[0].get_facecolor().tolist() != dark.collections[0].get_facecolor().tolist()


def test_forest_shows_medians_and_intervals():
    g = torch.Generator().manual_seed(0)
    chain, generator = torch.randn(4, 200, 3, generator=g), 0.5 * torch.randn(100, 3, generator=g)
    ax = rendered(plots.forest(chain, generator, ["a", "b", "c"], names=("NUTS", "generator")))
    assert labels(ax) == ["NUTS", "generator"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["c", "b", "a"]
    np.testing.assert_allclose(ax.lines[0].get_xdata(), np.median(chain.flatten(0, 1).numpy(), 0), rtol=1e-5, atol=1e-6)
    thin = ax.collections[0].get_segments()
    np.testing.assert_allclose(
        [thin[0][0][0], thin[0][1][0]], np.quantile(chain[:, :, 0].double().numpy(), (0.05, 0.95)), rtol=1e-5
    )
    assert "R-hat" in {text.get_text() for text in ax.texts}
    assert sum(text.get_text().startswith("1.0") for text in ax.texts) == 3
    assert not plots.forest(chain[:1], generator, ["a", "b", "c"]).texts
    with pytest.raises(ValueError, match=r"a label for each.*2 labels"):
        plots.forest(chain, generator, ["a", "b"])


def test_densities_have_unit_area():
    g = torch.Generator().manual_seed(0)
    chain, generator = torch.randn(2, 300, 4, generator=g), torch.randn(300, 4, generator=g)
    axes = plots.density(chain, generator, list("abcd"))
    assert [ax.get_title() for ax in axes] == list("abcd")
    for ax in axes:
        for line in ax.lines:
            x, y = line.get_data()
            assert area(x, y) == pytest.approx(1.0, abs=0.03)
    assert labels(rendered(axes[0])) == ["SGLD", "generator"]
    collapsed = plots.density(chain, torch.zeros(50, 4), list("abcd"))
    assert collapsed[0].get_ylim()[1] < 5 * collapsed[0].lines[0].get_ydata().max()
    rendered(plots.density(torch.zeros(2, 30, 1), torch.zeros(30, 1), ["a"])[0])
    with pytest.raises(ValueError, match="must be 4"):
        plots.density(chain, generator, list("abcd"), Figure().subplots(1, 2))


def test_the_legend_of_rank_bars_lies_within_the_figure():
    ax = rendered(plots.rank_bars(torch.randn(4, 50), torch.randn(200), label="p(class 8) at input 269"))
    box = ax.get_legend().get_window_extent()
    assert box.x1 <= ax.figure.bbox.x1


def test_rank_bars_are_flat_for_the_same_distribution_and_low_at_the_ends_for_a_narrow_one():
    g = torch.Generator().manual_seed(0)
    chain = torch.randn(4, 1000, generator=g)
    ax = rendered(plots.rank_bars(chain, chain.flatten()[::2], bins=8, label="w"))
    heights = [patch.get_height() for patch in ax.patches[:8]]
    np.testing.assert_allclose(heights, 1, atol=0.15)
    assert set(labels(ax)) == {"generator", "SGLD, 4 chains", "uniform"}
    narrow = plots.rank_bars(chain, 0.5 * chain.flatten(), bins=8)
    heights = [patch.get_height() for patch in narrow.patches[:8]]
    assert max(heights[0], heights[-1]) < 0.3
    assert min(heights[3:5]) > 1.5
    assert sum(heights) / 8 == pytest.approx(1.0)
    rendered(plots.rank_bars(torch.zeros(1, 20), torch.zeros(20)))


def test_ess_is_that_of_arviz():
    g = torch.Generator().manual_seed(0)
    chain = torch.randn(4, 100, 2, generator=g)
    ax = rendered(plots.ess(chain, ["a", "b"]))
    found = statistics(chain)
    np.testing.assert_allclose(ax.lines[0].get_xdata(), found["ess_bulk"])
    np.testing.assert_allclose(ax.lines[1].get_xdata(), found["ess_tail"])
    assert labels(ax) == ["SGLD, centre", "SGLD, tails", "draws of the chain"]
    with pytest.raises(ValueError, match="3 labels"):
        plots.ess(chain, list("abc"))


def test_roc_curve():
    inside, outside = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.35, 0.5])
    ax = rendered(plots.roc_curve({"SGLD": (inside, outside), "generator": (inside, inside)}, title="noise"))
    x, y = ax.lines[1].get_data()
    np.testing.assert_allclose(x, [0, 0, 0.25, 0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(y, [0, 0.5, 0.5, 1, 1, 1, 1])
    assert area(x, y) == pytest.approx(metrics.auroc(inside, outside))
    # Ties move along both axes at once: as good as guessing.
    np.testing.assert_allclose(*ax.lines[2].get_data())
    assert labels(ax) == ["guessing", "SGLD (AUROC 0.875)", "generator (AUROC 0.500)"]
    with pytest.raises(ValueError, match="at least one score"):
        plots.roc_curve({"SGLD": (inside, torch.tensor([]))})


def test_principal_pair_has_marginals():
    chain, generator = torch.randn(60, 5), torch.randn(60, 5)
    ax = rendered(plots.principal_pair(chain, generator))
    assert len(ax.child_axes) == 2
    assert not plots.principal_pair(chain, generator, marginals=False).child_axes


@pytest.mark.slow
def test_decision_surfaces(case):
    draws = {n: v.flatten(0, 1)[:30] for n, v in case.chain().items()}
    point = {n: v[:1].expand(30, *v.shape[1:]) for n, v in draws.items()}
    axes = plots.decision_surfaces(case.model, {"SGLD": draws, "generator": point}, case.x, case.y, resolution=12)
    assert [ax.get_title() for ax in axes] == [
        *(
            "SGLD: prediction",
            "SGLD: uncertainty of the model",
            "generator: prediction",
            "generator: uncertainty of the model",
        )
    ]
    rendered(axes[0])
    chain, collapsed = (np.asarray(ax.collections[0].get_array()) for ax in (axes[1], axes[3]))
    assert chain.max() > 0.1
    assert collapsed.max() < 1e-5
    assert axes[1].collections[0].get_clim() == axes[3].collections[0].get_clim()
    # The class that is painted is the one that is predicted.
    assert axes[0].images[0].get_array().shape == (12, 12, 3)
    with pytest.raises(ValueError, match=r"\(data, 2\).*\(4, 3\)"):
        plots.decision_surfaces(case.model, {"SGLD": draws}, torch.zeros(4, 3))
    with pytest.raises(ValueError, match="must be 2"):
        plots.decision_surfaces(case.model, {"SGLD": draws}, case.x, axes=[Figure().subplots()])


def test_surface_of_a_regression(case):
    draws = {"weight": torch.randn(20, 2), "scale": torch.ones(20)}
    axes = plots.decision_surfaces(case.regression, {"SGLD": draws}, torch.randn(9, 2), resolution=8)
    corner = torch.tensor([axes[1].get_xlim()[0], axes[1].get_ylim()[0]], dtype=torch.float32)
    expected = (draws["weight"] @ corner).std()
    assert np.asarray(axes[1].collections[0].get_array()).flat[0] == pytest.approx(float(expected), rel=1e-3)
    rendered(axes[1])


def test_every_plot_names_chain_and_generator_not_numbers(fidelity):
    values = torch.randn(3, 40, 2)
    found = [
        plots.forest(values, values[0], ["a", "b"]),
        *plots.density(values, values[0], ["a", "b"])[:1],
        plots.rank_bars(values[:, :, 0], values[0, :, 0]),
        plots.ess(values, ["a", "b"]),
        plots.trace(values[:, :, 0]),
        plots.principal_pair(values[0], values[1]),
    ]
    for ax in found:
        text = " ".join(labels(ax))
        assert "SGLD" in text
        assert "chain 0" not in text


def test_regression_band():
    x, mean = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([5.0, 3.0, 4.0])
    half = {0.5: 1.0, 0.9: 2.0}
    intervals = {level: torch.stack([mean - width, mean + width], 1) for level, width in half.items()}
    ax = rendered(plots.regression_band(x, mean, intervals, data=(x, mean + 0.5), xlabel="age"))
    assert labels(ax) == ["90 % interval", "50 % interval", "data", "mean"]
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[0, 3], [1, 4], [2, 5]])  # by the input
    wide, narrow = (ax.collections[i].get_datalim(ax.transData).height for i in (0, 1))
    assert (wide, narrow) == (6, 4)
    assert ax.get_xlabel() == "age"
    with pytest.raises(ValueError, match=r"intervals\[90\] has shape \(3, 2\)"):
        plots.regression_band(x, mean, {90: intervals[0.9]})
    with pytest.raises(ValueError, match=r"same shape \(N,\); got \(3,\) and \(2,\)"):
        plots.regression_band(x, mean[:2], {})


def test_calibration_of_intervals():
    targets = np.array([0.0, 1.0, 2.0, 3.0])
    ends = {0.9: np.array([[-1.0, 1.0]] * 4), 0.5: np.array([[0.5, 1.5]] * 4)}
    ax = rendered(plots.calibration_of_intervals({"network": ends}, targets))
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[0.5, 0.25], [0.9, 0.5]])
    assert labels(ax) == ["calibrated", "network"]
    with pytest.raises(ValueError, match=r"of shape \(4, 2\) by a probability"):
        plots.calibration_of_intervals({"network": {0.5: torch.zeros(4)}}, targets)
