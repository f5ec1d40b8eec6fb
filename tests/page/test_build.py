# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A page in a browser shows what the posterior predicts."""

import os
from pathlib import Path

import pytest
import torch

import pyro_apd as apd
from pyro_apd.export import fixed_latents
from pyro_apd.page import PageInputs, runtime, write_page
from tests.support.browser import Browser, find_browser
from tests.support.exported import low_rank_posterior, mlp, subspace_posterior

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

NUM_DRAWS = 8
ARCHIVE = Path(
    os.environ.get("PYRO_APD_RUNTIME", Path(__file__).parents[2] / "build" / f"onnxruntime-web-{runtime.VERSION}.tgz")
)
needs_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")
needs_runtime = pytest.mark.skipif(not ARCHIVE.exists(), reason="`make page` fetches the runtime")


def page(out, outputs=3, **settings):
    """The page of a small posterior: cells to draw in for classes, sliders for a regression."""
    x = torch.randn(5, 4)
    if outputs == 1:
        posterior, bnn = subspace_posterior(1, likelihood="gaussian")
        inputs = PageInputs.sliders((4,), x, ["<b>", "b", "c", "d"], ["one", "two"])
    else:
        posterior, bnn = low_rank_posterior(mlp(3))
        inputs = PageInputs.drawing((4,), (2, 2), x, ["one", "two"])
    return write_page(posterior, inputs, out, net=bnn, num_draws=NUM_DRAWS, **settings), posterior, bnn, x


def expected(posterior, bnn, values):
    draws = posterior.sample(latent=fixed_latents(posterior.generator, NUM_DRAWS))
    return apd.outputs(bnn, draws, torch.tensor([values]))


@pytest.mark.thorough
def test_without_a_runtime_the_page_says_how_to_get_it(tmp_path):
    path, *_ = page(tmp_path / "site", title="<i>A & B</i>")
    text = path.read_text()
    assert f"npm pack onnxruntime-web@{runtime.VERSION}" in text
    assert "&lt;i&gt;A &amp; B&lt;/i&gt;" in text
    assert "http://" not in text
    assert "https://" not in text
    assert {entry.name for entry in path.parent.iterdir()} == {"index.html", "model.js", "model.onnx"}
    with pytest.raises(ValueError, match="2 names of classes, and the network has 3"):
        page(tmp_path / "other", classes=["a", "b"])


@pytest.mark.slow
@needs_browser
@needs_runtime
def test_drawing_in_a_browser(tmp_path):
    path, posterior, bnn, _ = page(tmp_path / "site", runtime_path=ARCHIVE)
    assert sum(entry.stat().st_size for entry in path.parent.iterdir()) < 15e6
    with Browser(tmp_path / "profile") as browser:
        browser.open(path.as_uri(), 400)
        browser.wait("document.body.dataset.runs > 0")
        for act in (
            lambda: browser.click("#example-1"),
            lambda: browser.drag("#drawing", [(0.2, 0.2), (0.8, 0.3), (0.8, 0.3)]),
            lambda: (browser.value("document.querySelector('#drawing').focus()"), browser.press(" ")),
        ):
            before = browser.value("document.body.dataset.runs")
            act()
            browser.wait(f"document.body.dataset.runs > {before}")
            browser.wait("!window.APD.isBusy")
            compare_classes(browser, posterior, bnn)
        assert browser.value("document.querySelector('#answer').textContent").endswith("%)")
        assert_fits(browser)
        assert not browser.messages
        assert all(url.startswith(("file:", "blob:", "data:")) for url in browser.requests)


def compare_classes(browser, posterior, bnn):
    probs_SNK = expected(posterior, bnn, browser.value("Array.from(window.APD.values)")).probs_SNK
    shown = [float(browser.value(f"document.querySelector('#class-{k}').dataset.value")) for k in range(3)]
    assert shown == pytest.approx(probs_SNK.mean(0)[0].tolist(), abs=1e-5)
    for name in ("mutual_information", "predictive_entropy"):
        value = float(browser.value(f"document.querySelector('#{name}').dataset.value"))
        assert value == pytest.approx(float(getattr(apd.uncertainty, name)(probs_SNK)), abs=1e-5)
    networks = browser.value("window.APD.result.networks")
    assert networks == pytest.approx(probs_SNK.flatten().tolist(), abs=1e-5)


def assert_fits(browser):
    """No window of these sizes scrolls sideways, in either scheme."""
    for width in (400, 1400):
        for scheme in ("light", "dark"):
            browser.resize(width, 1000, scheme)
            assert browser.value("document.documentElement.scrollWidth") <= width


@pytest.mark.thorough
@needs_browser
@needs_runtime
def test_sliders_in_a_browser(tmp_path):
    path, posterior, bnn, _ = page(tmp_path / "site", outputs=1, runtime_path=ARCHIVE)
    with Browser(tmp_path / "profile") as browser:
        browser.open(path.as_uri(), 1400, scheme="dark")
        browser.wait("document.body.dataset.runs > 0")
        assert browser.value("document.querySelector('.slider label span').textContent") == "<b>"
        browser.value("document.querySelector('#slider-2').focus()")
        browser.press("ArrowRight")
        browser.wait("document.body.dataset.runs > 1")
        found = expected(posterior, bnn, browser.value("Array.from(window.APD.values)"))
        mean, variance = found.mean_SN, found.variance_SN
        shown = {
            n: float(browser.value(f"document.querySelector('#{n}').dataset.value")) for n in ("answer", "deviation")
        }
        assert shown["answer"] == pytest.approx(float(mean.mean()), rel=1e-5, abs=1e-5)
        total = float(apd.uncertainty.total_variance(mean, variance))
        assert shown["deviation"] == pytest.approx(total**0.5, rel=1e-5)
        assert_fits(browser)
        assert not browser.messages


def test_pages_are_of_one_class_or_one_number(tmp_path):
    posterior, bnn = subspace_posterior(2, likelihood="bernoulli")
    with pytest.raises(ValueError, match="one class of several, or one real number"):
        write_page(posterior, PageInputs.sliders((4,)), tmp_path, net=bnn)
