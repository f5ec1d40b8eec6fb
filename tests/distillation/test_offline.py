# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Distillation from end to end, on models small enough to take a second."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer import Predictive as PyroPredictive

from pyro_apd.chains.stores import base as chains_store
from pyro_apd.chains.stores.base import STATISTICS
from pyro_apd.chains.stores.disk import DiskStore, open_store
from pyro_apd.distillation import DistillationError, DistillationWarning, distill, setup
from pyro_apd.distillation.budget import TrainingBudget
from pyro_apd.distillation.objective import FunctionObjective
from pyro_apd.distillation.subspace import fit_default
from pyro_apd.generators import draw_blocks
from pyro_apd.models.bnn import BNN
from pyro_apd.models.layout import Layout
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.predictive import draws as predictive_draws
from pyro_apd.runtime.hashing import fingerprint
from tests.support.models import Classifier, Conjugate, constrained
from tests.support.storages import Largest

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (60,), generator=torch.Generator().manual_seed(2))
MODEL = Classifier()
SHAPES = {"first.weight": (6, 4), "first.bias": (6,), "second.weight": (3, 6), "second.bias": (3,)}


def chains(num_chains=2, num_draws=50, scale=0.3):
    """Draws around a centre a chain, as of a network in several modes."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(num_chains, 1, *shape, generator=generator)
        + scale * torch.randn(num_chains, num_draws, *shape, generator=generator)
        for name, shape in SHAPES.items()
    }


def of_classifier(**options):
    options = {"data": (X, Y), "num_steps": 4, "seed": 0, "progress": False, "group_by_chain": True, **options}
    return distill(chains(), MODEL, **options)


@pytest.fixture(scope="module")
def of_classifier_once():
    """For what does not change it."""
    return of_classifier()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_result_stands_in_for_the_chain(of_classifier_once):
    posterior = of_classifier_once
    assert isinstance(posterior, DistilledPosterior)
    draws = posterior.get_samples(30)
    assert {name: tuple(value.shape) for name, value in draws.items()} == {k: (30, *v) for k, v in SHAPES.items()}
    assert len(draws["first.bias"].unique(dim=0)) == 30
    by_draws = PyroPredictive(Classifier(), posterior_samples=draws)(X)["obs"]
    by_guide = PyroPredictive(Classifier(), guide=posterior, num_samples=30)(X)["obs"]
    assert by_draws.shape == by_guide.shape == (30, 60)


@pytest.mark.slow
def test_metadata_tell_what_was_done(of_classifier_once):
    posterior = of_classifier_once
    assert posterior.metadata["seed"] == 0
    assert posterior.metadata["space"] == "functions"
    assert (posterior.metadata["num_chains"], posterior.metadata["num_draws"]) == (2, 50)
    assert posterior.metadata["held_out"] == {"period": 25, "start": 10, "length": 5}
    assert posterior.metadata["metrics"].keys() == {"distance", "spread_ratio", "mi_ratio"}
    assert posterior.training_log["step"][-1] == 4


@pytest.mark.slow
def test_a_posterior_knows_its_data_its_precision_and_its_network():
    model = BNN(torch.nn.Linear(4, 3), likelihood="categorical")
    draws = {"net.weight": torch.randn(40, 3, 4), "net.bias": torch.randn(40, 3)}
    posterior = distill(draws, model, data=(X, Y), num_steps=2, seed=0, progress=False, storage_dtype="float16")
    assert posterior.metadata["data"] == fingerprint(X, Y)
    assert (posterior.storage_dtype, posterior.network()(X).shape) == ("float16", (60, 3))
    assert posterior.frozen.read == {}
    assert "data" not in distill(draws, num_steps=2, seed=0, progress=False).metadata


@pytest.mark.slow
def test_the_same_seed_gives_the_same_file_and_leaves_the_global_generator_alone(of_classifier_once, tmp_path):
    torch.rand(3)
    before = torch.get_rng_state()
    second = of_classifier()
    assert torch.equal(torch.get_rng_state(), before)
    contents = []
    for name, posterior in (("first", of_classifier_once), ("second", second)):
        posterior.save(tmp_path / name)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.slow
def test_another_seed_gives_another_generator(of_classifier_once):
    assert not same(of_classifier(seed=1).get_samples(3, seed=0), of_classifier_once.get_samples(3, seed=0))


@pytest.mark.slow
def test_without_a_seed_the_global_generator_decides():
    pyro.set_rng_seed(5)
    first = of_classifier(seed=None)
    second = of_classifier(seed=None)
    assert first.metadata["seed"] != second.metadata["seed"]
    assert same(of_classifier(seed=first.metadata["seed"]).get_samples(3, seed=0), first.get_samples(3, seed=0))


@pytest.mark.slow
def test_save_and_load_draw_the_same(of_classifier_once, tmp_path):
    posterior = of_classifier_once
    posterior.save(tmp_path / "posterior.safetensors")
    assert (tmp_path / "posterior.safetensors").stat().st_size == posterior.num_bytes
    loaded = DistilledPosterior.load(tmp_path / "posterior.safetensors")
    assert same(loaded.get_samples(9, seed=4), posterior.get_samples(9, seed=4))


@pytest.mark.slow
def test_training_in_function_space_beats_the_start():
    """Two clusters in one chain, which normal distributions around averages of a few draws fill in between."""
    side = torch.arange(200).remainder(2) * 2.0 - 1.0
    w = side[:, None] * torch.tensor([2.0, -1.0, 1.0]) + 0.1 * torch.randn(200, 3)
    posterior = distill({"w": w}, Conjugate().full, data=(Conjugate().x,), num_steps=200, seed=0, progress=False)
    assert posterior.metadata["metrics"]["distance"] < 0.97 * posterior.training_log["distance"][0]


@pytest.mark.slow
@pytest.mark.parametrize("space", ["functions", "weights"])
def test_a_gaussian_posterior_is_kept(space):
    model = Conjugate()
    w = torch.distributions.MultivariateNormal(model.mean, model.covariance).sample((600,))
    options = {} if space == "weights" else {"model": model.full, "data": (model.x, model.y)}
    posterior = distill({"w": w}, **options, num_steps=100, seed=0, progress=False)
    assert posterior.metadata["space"] == space
    drawn = posterior.get_samples(4000, seed=0)["w"]
    assert ((drawn.mean(0) - w.mean(0)).abs() < 0.5 * w.std(0)).all()
    assert (drawn.std(0) / w.std(0) - 1).abs().max() < 0.3


def test_standardisation_serves_entries_of_very_different_scale():
    w = torch.randn(200, 3) * torch.tensor([1e-4, 1.0, 1e4]) + torch.tensor([5.0, 0.0, -1e5])
    drawn = distill({"w": w}, num_steps=0, seed=0, progress=False).get_samples(3000, seed=0)["w"]
    assert (drawn.std(0) / w.std(0) - 1).abs().max() < 0.25
    assert ((drawn.mean(0) - w.mean(0)).abs() < 0.25 * w.std(0)).all()


def test_an_entry_that_never_moved_stays():
    w = torch.randn(50, 3)
    w[:, 1] = 7.0
    drawn = distill({"w": w}, num_steps=5, seed=0, progress=False).get_samples(20)["w"]
    torch.testing.assert_close(drawn[:, 1], torch.full((20,), 7.0), rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_apd.DistillationWarning")
@pytest.mark.parametrize("generator", ["subspace", "paper"])
def test_no_grad_and_autocast_around_make_no_difference(generator):
    def distilled():
        return distill(chains(), generator=generator, num_steps=2, group_by_chain=True, seed=0, progress=False)

    expected = distilled()
    for context in (torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            found = distilled()
        assert same(found.get_samples(3, seed=0), expected.get_samples(3, seed=0))
        assert found.metadata["metrics"] == expected.metadata["metrics"]


def test_inference_mode_is_refused():
    draws = chains()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"distill computes gradients.*inference_mode\(\)"):
        distill(draws, num_steps=1, group_by_chain=True, progress=False)


def test_weight_space_says_so(caplog):
    with caplog.at_level("INFO", "pyro_apd"):
        posterior = distill({"w": torch.randn(40, 5)}, num_steps=5, seed=0, progress=False)
    assert "without comparing what the draws predict" in caplog.text
    assert posterior.metadata["space"] == "weights"


def test_dtype_follows_the_draws():
    posterior = distill({"w": torch.randn(40, 5, dtype=torch.float64)}, num_steps=3, seed=0, progress=False)
    assert posterior.get_samples(2)["w"].dtype == torch.float64
    assert posterior.storage_dtype == "float32"  # which keeps each number at its own dtype


def test_the_posterior_at_hand_is_that_of_its_file(tmp_path):
    posterior = distill({"w": torch.randn(40, 3) @ torch.randn(3, 4000)}, num_steps=3, seed=0, progress=False)
    assert posterior.storage_dtype == "int8"
    posterior.save(tmp_path / "p.safetensors")
    loaded = DistilledPosterior.load(tmp_path / "p.safetensors")
    assert torch.equal(loaded.get_samples(5, seed=0)["w"], posterior.get_samples(5, seed=0)["w"])


@pytest.mark.slow
def test_constrained_sites_stay_in_their_support():
    y = torch.randn(30)
    draws = {
        "scale": torch.rand(60) + 0.2,
        "mix": dist.Dirichlet(torch.ones(3)).sample((60,)),
        "corr": dist.LKJCholesky(2, 2.0).sample((60,)),
    }
    posterior = distill(draws, constrained, data=(y,), num_steps=10, seed=0, progress=False)
    drawn = posterior.get_samples(50)
    assert (drawn["scale"] > 0).all()
    torch.testing.assert_close(drawn["mix"].sum(-1), torch.ones(50))
    assert drawn["corr"].shape == (50, 2, 2)


@pytest.mark.slow
def test_after_pyros_own_mcmc():
    model = Conjugate(num_data=30)
    mcmc = MCMC(NUTS(model.full), num_samples=40, warmup_steps=50, disable_progbar=True)
    mcmc.run(model.x, model.y)
    posterior = distill(mcmc, num_steps=10, seed=0, progress=False)
    assert posterior.metadata["space"] == "functions"
    assert posterior.get_samples(4).keys() == mcmc.get_samples().keys()


@pytest.mark.slow
@pytest.mark.parametrize("objective", [None, "wgan", "lsgan", "non-saturating"])
def test_the_papers_generator(objective):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DistillationWarning)  # 4 of 100,000 steps
        posterior = of_classifier(generator="paper", objective=objective)
    assert posterior.generator.config["kind"] == "paper"
    assert posterior.get_samples(3)["first.weight"].shape == (3, 6, 4)


def test_a_model_that_takes_its_data_no_other_way_is_run_on_all_of_them():
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", 60):
            pyro.sample("obs", dist.Normal(x.reshape(60, 4) @ w, 1.0))

    posterior = distill({"w": torch.randn(40, 4)}, model, data=(X,), num_steps=3, seed=0, progress=False)
    assert posterior.metadata["space"] == "functions"


def test_a_model_that_predicts_nothing_is_distilled_in_weight_space(caplog):
    def model(x):
        pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))

    with caplog.at_level("INFO", "pyro_apd"):
        posterior = distill({"w": torch.randn(40, 4)}, model, data=(X,), num_steps=3, seed=0, progress=False)
    assert posterior.metadata["space"] == "weights"
    assert "nothing it could predict" in caplog.text


@pytest.mark.slow
def test_probe_inputs_of_the_user_are_what_the_model_sees():
    seen = []

    class Watched(Classifier):
        def forward(self, x, y=None):
            seen.append(x.detach())
            return super().forward(x, y)

    probes = 100 + torch.randn(20, 4)
    distill(
        chains(), Watched(), data=(X,), probe_inputs=(probes,), num_steps=3, seed=0, progress=False, group_by_chain=True
    )
    assert all((x > 50).all() for x in seen if len(x) == TrainingBudget.num_probes)
    assert any(len(x) == TrainingBudget.num_probes for x in seen)


def test_probe_inputs_that_the_model_cannot_take():
    with pytest.raises(ValueError, match="cannot be run on `probe_inputs`"):
        of_classifier(probe_inputs=(torch.randn(5, 9),))


def test_probe_inputs_without_a_model():
    with pytest.raises(ValueError, match="are inputs of a model"):
        distill({"w": torch.randn(40, 4)}, probe_inputs=(X,), progress=False)


def plant_collapse(monkeypatch):
    """Draws of the start stripped of their spread."""

    def narrow(*args):
        fitted = fit_default(*args)
        fitted.generator.noise_cap.data.fill_(1e-9)
        for part in fitted.generator.parts_in_order():
            part.basis.zero_()
            part.mean.copy_(part.mean[:1].clone())
            part.forget()
        return fitted

    monkeypatch.setattr(setup, "fit_default", narrow)


def test_a_collapsed_generator_is_not_returned_silently(monkeypatch):
    plant_collapse(monkeypatch)
    with pytest.warns(DistillationWarning, match=r"collapsed: its .* Metrics on held-out draws, .*: distance"):
        of_classifier(num_steps=0)
    with pytest.raises(DistillationError, match="collapsed"):
        of_classifier(num_steps=0, strict=True)


def interrupt(monkeypatch, at):
    calls = []
    backward = FunctionObjective.backward

    def stopping(self, generate):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return backward(self, generate)

    monkeypatch.setattr(FunctionObjective, "backward", stopping)


@pytest.mark.slow
def test_ctrl_c_returns_the_best_so_far(monkeypatch):
    interrupt(monkeypatch, at=4)
    with pytest.warns(DistillationWarning, match="interrupted at step 3 of 4"):
        posterior = of_classifier()
    assert torch.isfinite(posterior.get_samples(5)["first.weight"]).all()


def test_state_is_restored_after_an_error(monkeypatch):
    before = torch.get_rng_state()

    def broken(self, generate):
        raise ZeroDivisionError

    monkeypatch.setattr(FunctionObjective, "backward", broken)
    with pytest.raises(ZeroDivisionError):
        of_classifier()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": -1}, "num_steps=-1"),
        ({"num_steps": 2.5}, "num_steps=2.5"),
        ({"num_steps": True}, "num_steps=True"),
        ({"seed": -3}, "seed=-3"),
        ({"rank": 0}, "rank=0"),
        (
            {"generator": "diffusion"},
            "generator='diffusion' must be one of 'paper', 'subspace'. None takes the default",
        ),
        ({"generator": "paper", "rank": 4}, "rank=4 has no meaning"),
        ({"generator": "paper", "objective": "gan"}, "objective='gan' with generator='paper': accepted are"),
        ({"storage_dtype": "int4"}, "`storage_dtype` must be one of"),
        ({"objective": "wgan"}, "objective='wgan' with generator='subspace'"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        of_classifier(**options)


def test_draws_that_are_all_the_same():
    with pytest.raises(ValueError, match="All draws are the same"):
        distill({"w": torch.ones(30, 4)}, progress=False)


@pytest.mark.parametrize("size", [1, 2, 300])
def test_sizes_below_and_above_the_rank(size):
    with warnings.catch_warnings():  # so few draws of so many numbers may come out too wide
        warnings.simplefilter("ignore", DistillationWarning)
        posterior = distill({"w": torch.randn(60, size)}, num_steps=2, seed=0, progress=False)
    assert posterior.generator.rank <= min(size, 33)  # two thirds of the draws to train on
    assert posterior.get_samples(3)["w"].shape == (3, size)


def set_part_bytes(monkeypatch, num_bytes):
    for module, name in (
        (draw_blocks, "_MIN_BYTES"),
        (draw_blocks, "_MAX_BYTES"),
        (draw_blocks, "_DRAWS_BYTES"),
        (chains_store, "_BLOCK_BYTES"),
        (predictive_draws, "_BLOCK_BYTES"),
    ):
        monkeypatch.setattr(module, name, num_bytes)


@pytest.mark.parametrize("options", [{}, {"data": None}], ids=["functions", "weights"])
def test_parts_change_a_result_by_rounding_alone(monkeypatch, options):
    # The last directions are made of rounding.
    options = {**options, "storage_dtype": "float32", "rank": 8}
    whole = of_classifier(num_steps=0, **options)
    set_part_bytes(monkeypatch, 1500)
    parts = of_classifier(num_steps=0, **options)
    ours, theirs = (posterior.layout.unconstrain(posterior.get_samples(20, seed=0)) for posterior in (parts, whole))
    difference_SD = (ours - theirs).abs()
    # An integer next to a half may be rounded to its other side, which moves a row of weights by a step.
    assert float((difference_SD > 1e-4).double().mean()) < 0.15
    assert float(difference_SD.max()) < 0.02
    # Evaluated with other random numbers, since these are made by the block.
    assert parts.metadata["metrics"] == pytest.approx(whole.metadata["metrics"], rel=5e-2, abs=5e-2)


@pytest.mark.slow
@pytest.mark.parametrize("space", ["functions", "weights"])
def test_draws_on_disk_are_never_copied_whole(tmp_path, monkeypatch, space):
    model = BNN(torch.nn.Sequential(torch.nn.Linear(100, 200), torch.nn.ReLU(), torch.nn.Linear(200, 4)))
    layout = Layout({name: prior.batch_shape + prior.event_shape for name, prior in model.priors.items()})
    store = DiskStore.create(tmp_path / "draws", layout, 1, 300, torch.float32)
    for draw in range(300):
        store.write(0, draw, 0.1 * torch.randn(1, layout.size), dict.fromkeys(STATISTICS, 1.0))
    store.close()
    set_part_bytes(monkeypatch, 2**21)
    # The evaluator's distances between draws, one matrix per probe, are small only beside larger networks.
    monkeypatch.setattr(
        TrainingBudget, "of", classmethod(lambda cls, *args: cls(num_probes=8, num_evaluation_draws=60))
    )
    store = open_store(tmp_path / "draws")
    known = {"model": model, "data": (torch.randn(50, 100), torch.arange(50) % 4)} if space == "functions" else {}
    with warnings.catch_warnings(), Largest(store.theta_CSD) as largest:
        warnings.simplefilter("ignore", DistillationWarning)
        posterior = distill(store, **known, num_steps=1, seed=0, progress=False)
    assert posterior.metadata["space"] == space
    # A batch of training, 64 or 100 latents; the other numbers that are compared, and moments of inputs, are fewer.
    assert largest.num_bytes <= 100 * posterior.latent_size * 4 < 0.4 * 300 * layout.size * 4


class Recurrent(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.out = kind(2, 4, batch_first=True), torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize(
    "kind",
    [torch.nn.GRU, *(pytest.param(kind, marks=pytest.mark.thorough) for kind in (torch.nn.LSTM, torch.nn.RNN))],
)
def test_that_draws_are_evaluated_one_by_one_is_said_once(kind, caplog):
    net = Recurrent(kind)
    draws = {name: torch.randn(10, *value.shape) for name, value in net.named_parameters(prefix="net")}
    model = BNN(net, prior_scale=1.0, likelihood="categorical")
    x, y = torch.randn(8, 3, 2), torch.arange(8) % 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DistillationWarning)  # of ten draws
        distill(draws, model, data=(x, y), num_steps=2, seed=0, progress=False)
    assert caplog.text.count("one by one") == 1
