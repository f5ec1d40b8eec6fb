# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The whole workflow on embedded data: sampling, distillation, comparison, files."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pyro_apd import diagnostics
from pyro_apd.chains import MCMC
from pyro_apd.datasets import Dataset, digits, inverted, noise
from pyro_apd.distillation import distill
from pyro_apd.kernels import SGLD
from pyro_apd.models.bnn import BNN
from pyro_apd.page import PageInputs, write_page
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.predictive.predictive import Predictive

logger = logging.getLogger("pyro_apd")

NUM_PREDICTIVE_DRAWS = 200
# Of the page: test images that are buttons, and rows and columns of an image.
NUM_EXAMPLES, IMAGE = 10, (8, 8)
PAGE_TITLE = "Handwritten digits: what do 50 networks say?"


@dataclass(frozen=True)
class Budget:
    """Amount of work that the demo does.

    :ivar num_chains: chains, each started at its own draw from the prior.
    :ivar num_samples: draws kept per chain.
    :ivar warmup_steps: draws per chain that are discarded first.
    :ivar thinning: Langevin steps per draw.
    :ivar has_page: whether to write a page for the browser.
    """

    num_chains: int = 4
    num_samples: int = 300
    warmup_steps: int = 150
    thinning: int = 40
    has_page: bool = True


FULL = Budget()
QUICK = Budget(num_chains=2, num_samples=60, warmup_steps=30, thinning=20, has_page=False)


@dataclass(frozen=True)
class DemoResult:
    """Results of the demo, and where they are."""

    fidelity: diagnostics.Fidelity
    posterior_path: Path
    chains_path: Path
    report_path: Path
    page_path: Path | None
    seconds: float


def run_demo(
    out: Path, *, seed: int = 0, budget: Budget = FULL, device: str = "cpu", runtime: Path | None = None
) -> DemoResult:
    """Samples, distils and compares on the handwritten digits of scikit-learn, and writes three files.

    :param Path out: folder for ``posterior.safetensors``, ``chains.nc``, ``report.html`` and ``page/``; made if
        missing.
    :param int seed: makes chains, generator and table reproducible.
    :param Budget budget: amount of work.
    :param str device: where to compute.
    :param runtime: of the page, see :func:`pyro_apd.page.write_page`.
    """
    with one_thread():
        return _run_demo(out, seed, budget, device, runtime)


def _run_demo(out: Path, seed: int, budget: Budget, device: str, runtime: Path | None) -> DemoResult:
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    data = digits(seed=seed).to(device)
    model = digit_model().to(device)
    ood = {"noise": noise(data.x_test, seed=seed), "inverted": inverted(data.x_test)}

    with stage(f"Sampling {budget.num_chains} chains with SGLD"):
        mcmc = sample_chains(model, data, seed, budget)
    with stage("Distilling the chains into a generator"):
        posterior = distill(mcmc, seed=seed)
    with stage("Predicting from chains and generator"):
        report_predictions(model, mcmc, posterior, data)
    with stage("Comparing chain and generator"):
        fidelity = diagnostics.compare(
            *(mcmc, posterior, model, data.x_test, data.y_test),
            ood=ood,
            num_samples=NUM_PREDICTIVE_DRAWS,
            seed=seed,
        )
    with stage("Writing files"):
        posterior_path = out / "posterior.safetensors"
        posterior.save(posterior_path)
        chains_path = diagnostics.save_netcdf(diagnostics.to_arviz(mcmc, posterior, seed=seed), out / "chains.nc")
        report_path = diagnostics.report(
            mcmc,
            posterior,
            model,
            data.x_test,
            data.y_test,
            ood=ood,
            fidelity=fidelity,
            path=out / "report.html",
            title="Digits: 64-50-10 Bayesian neural network",
            seed=seed,
            image_shape=IMAGE,
        )
        x, y, noisy, inverse = (v.cpu().numpy() for v in (data.x_test, data.y_test, *ood.values()))
        np.savez(out / "test.npz", x=x, y=y, ood_noise=noisy, ood_inverted=inverse)
        draw_summary(fidelity, out / "summary.png")
    page_path = None
    if budget.has_page:
        with stage("Writing a page for the browser"):
            page_path = write_digit_page(posterior.to("cpu"), data, out, runtime)
    seconds = time.monotonic() - start
    return DemoResult(fidelity, posterior_path, Path(chains_path), report_path, page_path, seconds)


def write_digit_page(posterior: DistilledPosterior, data: Dataset, out: Path, runtime: Path | None) -> Path | None:
    """A page in which a digit is drawn, and its examples in ``digits.npz``; None without packages of the extra."""
    x, labels = data.x_test[:NUM_EXAMPLES].cpu(), [str(int(label)) for label in data.y_test[:NUM_EXAMPLES]]
    np.savez(out / "digits.npz", x=x.numpy(), labels=np.array(labels))
    inputs = PageInputs.drawing(x.shape[1:], IMAGE, x, labels)
    try:
        return write_page(*(posterior, inputs, out / "page"), net=digit_model(), title=PAGE_TITLE, runtime_path=runtime)
    except ImportError as error:
        logger.info("  left out: %s", error)
        return None


def digit_model() -> BNN:
    """The model of the digits."""
    return BNN(digit_network(), likelihood="categorical", prior_scale=0.4)


def draw_summary(fidelity: diagnostics.Fidelity, path: Path) -> None:
    """The comparison in three panels: agreement by input, and the scores of noise and inverted digits by either."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    chain, generator = fidelity.per_input["chain"], fidelity.per_input["generator"]
    diagnostics.plots.score_scatter(chain["mi"], generator["mi"], axes[0])
    axes[0].set_title("each test image")
    upper = float(max(chain["mi[noise]"].max(), generator["mi[noise]"].max(), chain["mi[inverted]"].max()))
    for ax, scores, title in zip(axes[1:], (chain, generator), ("SGLD chains", "generator"), strict=True):
        outside = {name: scores[f"mi[{name}]"] for name in ("noise", "inverted")}
        diagnostics.plots.score_histograms(
            scores["mi"], outside, ax, score="mutual information (nats)", upper=upper, title=title
        )
    figure.savefig(path, dpi=110)


def digit_network() -> nn.Module:
    """The 64-50-10 network."""
    return nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))


def sample_chains(model: BNN, data: Dataset, seed: int, budget: Budget) -> MCMC:
    """SGLD on mini-batches of 100, all chains as one computation."""
    kernel = SGLD(model, step_size=1e-4, batch_size=100, thinning=budget.thinning, seed=seed)
    mcmc = MCMC(kernel, budget.num_samples, budget.warmup_steps, num_chains=budget.num_chains)
    mcmc.run(data.x_train, data.y_train)
    return mcmc


def report_predictions(model: BNN, mcmc: MCMC, posterior: DistilledPosterior, data: Dataset) -> None:
    """Labels drawn through ``Predictive`` from either, and the accuracy of the majority of draws."""
    stored = Predictive(model, posterior_samples=mcmc.get_samples(NUM_PREDICTIVE_DRAWS))
    generated = Predictive(model, guide=posterior, num_samples=NUM_PREDICTIVE_DRAWS)
    for name, predictive in (("chain", stored), ("generator", generated)):
        labels_SN: Tensor = predictive(data.x_test)["obs"]
        accuracy = (labels_SN.mode(0).values == data.y_test).float().mean()
        logger.info("  %s: %d label draws per image, majority correct on %.1f %%", name, len(labels_SN), 100 * accuracy)


@contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread inside, and in processes begun there: for small matrices threads cost more than they give."""
    before, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if variable is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = variable


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Announces a stage and logs how long it took."""
    logger.info("%s ...", title)
    start = time.monotonic()
    yield
    logger.info("  done in %.0f s", time.monotonic() - start)


def require_device(device: str) -> None:
    """Raises ValueError if torch cannot compute on ``device``."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: torch cannot use it here ({error}). Try --device cpu.") from error
