# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import re
import sys
from html.parser import HTMLParser
from importlib import resources

import matplotlib.pyplot
import pytest
import torch

from pyro_apd.diagnostics import compare, report
from pyro_apd.diagnostics.comparison import fidelity as fidelity_module
from pyro_apd.diagnostics.html import pictures


class Page(HTMLParser):
    """What a browser would fetch or run, and whether tags are closed."""

    VOID = frozenset({"meta", "img", "source", "br", "link", "hr"})

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.urls = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = re.sub(r"<style>.*?</style>|<[^>]*>", " ", self.source, flags=re.S)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.urls += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def unpainted(monkeypatch):
    """Pages with empty pictures, where the words matter."""

    def picture(draw, size, caption):
        return pictures.Picture("data:image/png;base64,", "data:image/png;base64,", caption, 1)

    monkeypatch.setattr(pictures, "picture", picture)


@pytest.fixture
def written(case, tmp_path):
    def write(chain=None, posterior=None, **options):
        mcmc = case.StubMCMC(case.chain() if chain is None else chain, case.model)
        options = {"x": case.x, "y": case.y, "ood": case.ood, **options}
        return report(mcmc, posterior or case.posterior(), path=tmp_path / "report.html", **options)

    return write


@pytest.mark.slow
def test_page_is_whole_and_alone(written):
    path = written(title="Digits & <friends>")
    page = Page(path)
    assert page.open == []
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.urls
    anchors = [url for url in page.urls if url.startswith("#")]
    assert anchors
    assert all(f'id="{anchor[1:]}"' in page.source for anchor in anchors)
    assert all(url.startswith("data:image/png;base64,") for url in page.urls if url not in anchors)
    assert not re.search(r"https?://|@import|url\(", page.source)
    assert path.stat().st_size < 5e6
    assert "Digits &amp; &lt;friends&gt;" in page.source
    assert "prefers-color-scheme: dark" in page.source
    assert "&lt;b&gt;&amp;" in page.source  # the note in the metadata
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_verdict_and_table_come_first(case, written, unpainted):
    mcmc = case.StubMCMC(case.chain(), case.model)
    fidelity = compare(mcmc, case.posterior(sd=0.0), x=case.x, y=case.y, ood=case.ood)
    page = Page(written(posterior=case.posterior(sd=0.0), fidelity=fidelity))
    order = [page.text.index(fidelity.verdict), *(page.source.index(f'<h2 id="{t}"') for t in ("functions", "weights"))]
    order += [page.source.index(f'<h2 id="{name}"') for name in ("health", "training", "provenance")]
    assert order == sorted(order)
    assert 'class="verdict loses"' in page.source
    for row in fidelity.rows:
        assert row.label in page.text
        assert f"{row.generator:.4f}" in page.text
    assert page.source.index("<table") < page.source.index("<h2")


@pytest.mark.slow
def test_good_collapsed_and_unmixed_look_different(case, written, unpainted):
    statuses = []
    for chain, posterior in [
        (case.chain(), case.posterior()),
        (case.chain(), case.posterior(sd=0.0)),
        (case.chain(sd=0.02, spread=1.0), case.posterior()),
    ]:
        source = written(chain, posterior).read_text()
        statuses.append(re.search(r'class="verdict (\w+)"><b>([\w ]+)</b>', source).groups())
    assert statuses == [
        ("indistinguishable", "No loss found"),
        ("loses", "Loss found"),
        ("unclear", "Undecided"),
    ]


def test_sections_hold_what_there_is(case, written, unpainted):
    few = {name: value.flatten(0, 1)[:5] for name, value in case.chain(seed=4).items()}
    page = Page(written(baselines={"few <draws>": few}))
    assert page.open == []
    assert 'data-label="few &lt;draws&gt;"' in page.source
    assert "5 networks" in page.text[page.text.index("Provenance") :]
    for words in ("critic loss", "SGLD chain", "step_size", "0.001", "potential", "ESS bulk", "seed of this report"):
        assert words in page.text
    assert "4 chains of 100 stored draws, 1 of them diverging" in page.text
    # Function values, two scatters, calibration, two pairs of histograms, ROC, two against bytes; weights; trace; loss.
    assert page.tags.count("figure") == page.tags.count("img") == 16
    assert page.tags.count("source") == 32
    assert "hidden" in page.text
    assert "ROC curve: far against the inputs" in page.text


def test_one_chain_is_told_in_words(case, written, unpainted):
    page = Page(written(case.chain(num_chains=1)))
    assert "no R-hat" in page.text
    assert not re.search(r"\bnan\b", page.text)


def test_draws_alone_make_a_page_too(case, tmp_path, unpainted):
    path = report(
        case.chain(), {n: v.flatten(0, 1)[:50] for n, v in case.chain(seed=2).items()}, path=tmp_path / "r.html"
    )
    page = Page(path)
    assert "No inputs were given" in page.text
    assert "has no training log" in page.text
    assert not re.search(r"\bnan\b", page.text)


def test_regression_page(case, tmp_path, unpainted):
    x = torch.randn(30, 2)
    draws = {"weight": torch.randn(60, 2), "scale": torch.rand(60) + 0.1}
    page = Page(report(draws, draws, case.regression, x, x.sum(-1), path=tmp_path / "r.html", ood={"far": 3 * x}))
    assert "mean epistemic variance" in page.text
    assert "RMSE" in page.text


def test_kernel_step_size_and_warnings_are_told(case, tmp_path, unpainted, monkeypatch):
    found = {"kernel": "SGHMC", "step_size": 0.25, "is_automatic": True, "warnings": ["too <short>"]}
    monkeypatch.setattr(sys.modules[report.__module__], "sampler_summary", lambda mcmc: found)
    page = Page(report(case.chain(), case.posterior(), path=tmp_path / "r.html"))
    assert "SGHMC, step size 0.25, chosen during warm-up." in page.text
    assert "warning: too &lt;short&gt;" in page.text


@pytest.mark.slow
def test_same_seed_same_file_and_nothing_else_changes(case, written, unpainted):
    state = torch.get_rng_state()
    first = written(seed=3).read_bytes()
    assert written(seed=3).read_bytes() == first
    assert torch.equal(torch.get_rng_state(), state)


def test_pictures_do_not_depend_on_settings():
    def drawn():
        return pictures.picture(lambda figure: figure.subplots().plot([1, 2]), (2, 2), "a line")

    first = drawn()
    with matplotlib.rc_context({"font.size": 3.0, "axes.facecolor": "pink"}):
        settings = dict(matplotlib.rcParams)
        assert drawn() == first
        assert dict(matplotlib.rcParams) == settings
    assert first.light != first.dark
    # ArviZ brings pyplot; nothing is left open in it.
    assert not matplotlib.pyplot.get_fignums()


@pytest.mark.slow
def test_failure_leaves_the_old_page(case, written, monkeypatch, unpainted):
    path = written()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="num_samples"):
        written(num_samples=2)
    monkeypatch.setattr(type(path), "write_text", lambda *a, **k: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        written()
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1


def test_missing_folder_costs_nothing(case, tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity_module, "split_draws", None)
    with pytest.raises(FileNotFoundError, match="no folder"):
        report(case.chain(), case.posterior(), path=tmp_path / "absent" / "r.html")


def test_template_ships_with_the_package():
    assert resources.files("pyro_apd.diagnostics.html").joinpath("report.html.jinja").is_file()


def test_a_warning_makes_the_box_yellow_and_comes_first(case, written, unpainted):
    posterior = case.posterior()
    posterior.metadata["warnings"] = ["draws disagree twice as much. Look."]
    page = Page(written(posterior=posterior))
    assert 'class="verdict unclear"' in page.source
    assert "The distillation warned: draws disagree twice as much. Apart from that: indistinguishable" in page.text


def test_what_is_known_of_model_and_data_is_in_the_page(case, written, unpainted):
    posterior = case.posterior()
    posterior.metadata |= {"data": "abc123", "seed": 7}
    text = Page(written(posterior=posterior)).text
    for part in ("digest of the data", "abc123", "seed of the distillation"):
        assert part in text
