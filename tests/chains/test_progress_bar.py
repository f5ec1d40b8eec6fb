# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What is about to take long is shown in the progress bar of a run."""

from pyro.infer.mcmc.logger import ProgressBar

from pyro_apd.chains.driver import MCMC
from pyro_apd.chains.group import Plan
from pyro_apd.chains.progress_bar import ProgressBars
from pyro_apd.kernels import SGLD
from pyro_apd.runtime.announcements import announce
from tests.support.models import Conjugate


def test_a_run_shows_what_is_announced_between_its_draws(monkeypatch):
    shown = []
    monkeypatch.setattr(ProgressBars, "announce", lambda self, text: shown.append(text))

    def hook(kernel, params, stage, i):
        announce(f"{stage} {i}")

    problem = Conjugate()
    MCMC(SGLD(problem.full, 1e-3, seed=1), 1, 1, hook_fn=hook, disable_progbar=True).run(problem.x, problem.y)
    assert shown == ["Warmup 0", "Sample 0"]


def test_it_is_the_description_of_the_bar(monkeypatch):
    shown = []
    monkeypatch.setattr(ProgressBar, "set_description", lambda self, text, **options: shown.append((text, options)))
    with ProgressBars(Plan(1, 1, 1), 1, is_disabled=False) as bars:
        bars.announce("Compiling")
    with ProgressBars(Plan(1, 1, 1), 1, is_disabled=True) as bars:
        bars.announce("Not shown")
    assert shown == [("Compiling", {"pos": 0, "refresh": True})]
