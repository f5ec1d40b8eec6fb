# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import torch

from pyro_apd.generators import PaperGenerator
from pyro_apd.models.layout import Layout
from pyro_apd.posterior import shown
from pyro_apd.posterior.posterior import DistilledPosterior


def posterior(**metadata):
    layout = Layout({name: (3,) for name in "abcde"})
    return DistilledPosterior(layout, PaperGenerator(layout.size, 4, 8), metadata=metadata)


def test_it_says_what_it_is_of_and_its_size():
    found = posterior(num_chains=2, num_draws=50, metrics={"spread_ratio": 1.0, "distance": 0.1}, warnings=["Too few."])
    first, size, generator, draws, metrics, warning = repr(found).splitlines()
    assert first == "DistilledPosterior: 15 numbers in 5 sites (a, b, c, d, ...)"
    assert f"{found.num_bytes:,} bytes ({found.num_bytes / 60:.3g} networks), float32" in size
    assert "PaperGenerator, latent_size=4, width=8" in generator
    assert "2 chains of 50 draws" in draws
    assert "distance 0.1, spread_ratio 1.0" in metrics
    assert "Too few." in warning


def test_it_never_fails(monkeypatch):
    assert "7 distinct networks" in repr(posterior(distinct_draws=7))
    assert "float32" in repr(posterior(note=torch.ones(1)))  # which cannot be saved
    assert repr(posterior(metrics=None, warnings=3)).count("\n") == 2
    monkeypatch.setattr(shown, "_MANY", 10)
    monkeypatch.setattr(DistilledPosterior, "num_bytes", property(lambda _: 1 / 0))
    assert "bytes" not in repr(posterior())
