# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from pyro_apd.diagnostics import compare, plots


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


def rendered(ax):
    """Draws for real, so that a bad limit or label shows."""
    ax.figure.savefig("/dev/null", format="png", dpi=30)
    return ax


def test_scatter_shows_each_input():
    chain, generator = torch.rand(50), torch.rand(50)
    ax = rendered(plots.score_scatter(chain, generator, names=("NUTS", "APD")))
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
    ax = rendered(plots.calibration_curve({"SGLD": probs, "APD": probs}, labels_N))
    x, y = ax.lines[1].get_data()
    np.testing.assert_allclose(x, [0.65, 0.9], rtol=1e-6)
    np.testing.assert_allclose(y, [0.5, 0.9])
    assert labels(ax) == ["calibrated", "SGLD (ECE 0.075)", "APD (ECE 0.075)"]
    few = plots.calibration_curve({"SGLD": probs[:4]}, labels_N[:4])
    assert len(few.lines[1].get_xdata()) == 0


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
    assert labels(ax) == ["SGLD", "APD"]


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


def test_quality_against_bytes(fidelity):
    ax = rendered(plots.quality_against_bytes(fidelity, "mean_mi"))
    points = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines[1:]}
    row, size = fidelity["mean_mi"], fidelity.num_bytes
    assert points["SGLD, all draws"] == (size["chain"], row.chain)
    assert points["APD generator"] == (size["generator"], row.generator)
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
