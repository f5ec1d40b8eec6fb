# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Large networks: the generator and the work that suit them, and what of the draws is read at a time."""

import sys
import warnings

import pytest
import torch
from torch import nn

from pyro_apd.chains.stores import base as chains_store
from pyro_apd.chains.stores.base import STATISTICS
from pyro_apd.chains.stores.disk import DiskStore, open_store
from pyro_apd.distillation import DistillationWarning, budget, distill
from pyro_apd.distillation.budget import (
    CHUNKED_FROM,
    MAX_CHUNKED_RANK,
    PredictionCost,
    TrainingBudget,
    choose_generator,
)
from pyro_apd.generators import ChunkedGenerator, CoordinateGenerator, draw_blocks
from pyro_apd.models.bnn import BNN
from pyro_apd.models.layout import Layout
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.predictive import draws as predictive_draws
from tests.support.storages import Largest

pytestmark = pytest.mark.slow

SIZES = (20, 16, 3)


@pytest.fixture
def few(monkeypatch):
    """What is tested does not hang on how finely generators are compared, and that is most of the time."""
    monkeypatch.setattr(
        TrainingBudget,
        "of",
        classmethod(lambda cls, *args: cls(num_steps=2, batch_size=12, num_probes=8, num_evaluation_draws=30)),
    )


def bayesian(sizes=SIZES):
    net = nn.Sequential(nn.Linear(*sizes[:2]), nn.ReLU(), nn.Linear(*sizes[1:]))
    return BNN(net, prior_scale="fan_in")


def data(sizes=SIZES):
    return torch.randn(40, sizes[0], generator=torch.Generator().manual_seed(1)), torch.arange(40) % sizes[-1]


def drifting(num_draws=60, sizes=SIZES):
    """Draws of a chain that moves."""
    shapes = {name: prior.batch_shape + prior.event_shape for name, prior in bayesian(sizes).priors.items()}
    layout = Layout(shapes)
    around_SD, path_SD = torch.randn(2, num_draws, layout.size, generator=torch.Generator().manual_seed(2))
    theta_SD = 0.3 * around_SD + 0.1 * path_SD.cumsum(0)
    return layout.split(theta_SD)


def of(generator, known=True, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DistillationWarning)
        known_by = {"model": bayesian(), "data": data()} if known else {}
        return distill(drifting(), **known_by, generator=generator, seed=0, progress=False, **options)


def moments(posterior):
    theta_SD = posterior.layout.unconstrain(posterior.get_samples(4000, seed=1))
    return theta_SD.mean(0), torch.cov(theta_SD.mT)


def test_work_falls_with_size_and_not_below_what_is_of_use():
    assert TrainingBudget.of(CHUNKED_FROM) == TrainingBudget() == TrainingBudget.of(500, 1000)
    larger, largest = TrainingBudget.of(4 * CHUNKED_FROM), TrainingBudget.of(1000 * CHUNKED_FROM)
    assert (larger.num_steps, larger.batch_size, larger.num_evaluation_draws) == (125, 32, 100)
    assert largest == TrainingBudget(50, 16, num_evaluation_draws=40, num_evaluations=5)
    assert TrainingBudget.of(1000, 4 * CHUNKED_FROM) == larger


def test_products_of_an_input():
    layer, filters = nn.Linear(30, 20), nn.Conv2d(1, 4, 3)
    x, images = torch.ones(1, 30), torch.ones(1, 1, 10, 10)
    assert PredictionCost.of(lambda: layer(x).relu()) == PredictionCost(600, 2 * 20 * 4)
    assert PredictionCost.of(lambda: filters(images).flatten(1)) == PredictionCost(8 * 8 * 4 * 9, 8 * 8 * 4 * 4)
    assert PredictionCost.of(lambda: 1 / 0) == PredictionCost()


def test_without_torchs_dispatch_modes_nothing_is_known_of_the_work(monkeypatch):
    """They are no public interface of torch; the test above notices if they change."""
    layer, x = nn.Linear(30, 20), torch.ones(1, 30)
    monkeypatch.setitem(sys.modules, "torch.utils._python_dispatch", None)
    assert PredictionCost.of(lambda: layer(x)) == PredictionCost()


def test_the_generator_follows_from_the_size():
    assert choose_generator(CHUNKED_FROM - 1, torch.float32, None) == "coordinates"
    assert choose_generator(CHUNKED_FROM, torch.float32, None) == "chunked"
    assert choose_generator(CHUNKED_FROM, torch.float32, "int8") == "chunked"
    # Whoever asks for more digits gets them.
    assert choose_generator(CHUNKED_FROM, torch.float32, "float16") == "coordinates"
    assert choose_generator(CHUNKED_FROM, torch.float64, None) == "coordinates"


def test_large_networks_are_distilled_in_chunks(few, monkeypatch):
    assert isinstance(of(None).generator, CoordinateGenerator)
    monkeypatch.setattr(budget, "CHUNKED_FROM", 300)
    posterior = of(None)
    assert isinstance(posterior.generator, ChunkedGenerator)
    assert posterior.metadata["space"] == "functions"


def test_how_many_coordinates_so_many_draws_have(few):
    """Of 60 draws 50 are trained on: half as many coordinates in chunks, a quarter by default."""
    ranks = {kind: of(kind, num_steps=0).generator.rank for kind in ("coordinates", "chunked")}
    assert ranks == {"coordinates": 12, "chunked": 25}


def test_a_file_stays_within_twelve_networks():
    """An eighth bit a coordinate and weight, location and noise: with the largest rank there is."""
    layout = Layout({"a": (300, 200)})
    lengths = [10_000] * 6
    generator = ChunkedGenerator(60_000, MAX_CHUNKED_RANK, lengths, 40, [(0, 300, 200, 32)], 1, mlp_width=32)
    assert DistilledPosterior(layout, generator, storage_dtype="int8").num_bytes <= 12 * 4 * 60_000


@pytest.mark.parametrize("known", [True, False], ids=["functions", "weights"])
def test_the_start_has_the_law_of_the_default(few, known):
    """Noise is no part of what is compared bit for bit: it comes from other numbers."""
    whole, parts = (of(kind, known, num_steps=0, rank=12) for kind in ("coordinates", "chunked"))
    (mean_D, covariance_DD), (found_D, found_DD) = moments(whole), moments(parts)
    scale_D = covariance_DD.diagonal().sqrt()
    torch.testing.assert_close(found_D / scale_D, mean_D / scale_D, rtol=0, atol=0.1)
    assert float((found_DD - covariance_DD).norm() / covariance_DD.norm()) < 0.1
    if not known:
        latent_SL = torch.randn(50, whole.latent_size)
        expected, found = (posterior.sample(latent=latent_SL) for posterior in (whole, parts))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0.05, atol=0.05 * float(value.std()))


def test_training_in_coordinates_is_training(few):
    start, trained = (of("chunked", False, num_steps=steps) for steps in (0, 6))
    assert trained.training_log["step"][-1] == 6
    assert trained.metadata["metrics"]["distance"] <= start.metadata["metrics"]["distance"] + 1e-6
    assert trained.generator.rank == start.generator.rank


@pytest.mark.parametrize(("kind", "made"), [("chunked", ChunkedGenerator), ("coordinates", CoordinateGenerator)])
def test_noise_that_is_too_loud_is_turned_down(kind, made, few, monkeypatch):
    fit = made.fit.__func__

    def loud(cls, *args, **options):
        generator = fit(cls, *args, **options)
        generator.scale_noise(8.0)
        return generator

    monkeypatch.setattr(made, "fit", classmethod(loud))
    start, quieter = of(kind, num_steps=0), of(kind, num_steps=1)
    scale = [float(posterior.generator.noise[0].row_scale.mean()) for posterior in (start, quieter)]
    assert scale[1] < 0.4 * scale[0]
    assert quieter.metadata["metrics"]["distance"] < start.metadata["metrics"]["distance"]


def test_the_same_seed_gives_the_same_file(few, tmp_path):
    for name in "ab":
        of("chunked").save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("known", [True, False], ids=["functions", "weights"])
def test_nothing_is_made_of_a_store_on_disk_that_is_larger_than_a_few_networks(tmp_path, monkeypatch, few, known):
    sizes, num_draws = (300, 40, 4), 200
    draws = drifting(num_draws, sizes)
    layout = Layout({name: value.shape[1:] for name, value in draws.items()})
    store = DiskStore.create(tmp_path / "draws", layout, 1, num_draws, torch.float32)
    for draw, theta_D in enumerate(layout.join(draws)):
        store.write(0, draw, theta_D[None], dict.fromkeys(STATISTICS, 1.0))
    store.close()
    network = 4 * layout.size
    for module, name in (
        (draw_blocks, "_MIN_BYTES"),
        (draw_blocks, "_MAX_BYTES"),
        (chains_store, "_BLOCK_BYTES"),
        (predictive_draws, "_BLOCK_BYTES"),
    ):
        monkeypatch.setattr(module, name, 4 * network)
    monkeypatch.setattr(draw_blocks, "_DRAWS_BYTES", network)
    store = open_store(tmp_path / "draws")
    options = {"model": bayesian(sizes), "data": data(sizes)} if known else {}
    with warnings.catch_warnings(), Largest(store.theta_CSD) as largest:
        warnings.simplefilter("ignore", DistillationWarning)
        posterior = distill(store, **options, generator="chunked", seed=0, progress=False)
    # Of 200 draws: the parts that they are read in, and the basis, of forty rows of eight bits.
    assert posterior.generator.rank == 40
    assert 4 * network <= largest.num_bytes <= 10.5 * network
