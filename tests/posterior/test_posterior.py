# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The distilled posterior as a citizen of Pyro, with a generator whose draws are known."""

import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, WeighedPredictive
from torch import nn
from torch.distributions import constraints

import pyro_apd.posterior.building
from pyro_apd.errors import ArtifactError
from pyro_apd.generators import Generator, LowRankGenerator, PaperGenerator, SubspaceGenerator, build_generator
from pyro_apd.models.layout import Layout
from pyro_apd.posterior.posterior import NOISE_SITE, DistilledPosterior
from pyro_apd.predictive.predictive import Predictive as VectorisedPredictive
from tests.support.models import Classifier


class Affine(Generator):
    """theta = shift + scale * latent: a Gaussian that can be checked."""

    def __init__(self, size):
        super().__init__()
        self.output_size = self.latent_size = size
        self.shift = nn.Parameter(torch.linspace(-1, 1, size))
        self.register_buffer("scale", torch.full((size,), 0.5))

    @property
    def config(self):
        return {"kind": "affine", "size": self.output_size}

    def forward(self, latent):
        return self.shift + self.scale * latent


@pytest.fixture(autouse=True)
def _affine_generators(monkeypatch):
    def build(config):
        if config.get("kind") in ("paper", "low-rank"):
            return build_generator(config)
        if config.get("kind") != "affine":
            raise ValueError(f"unknown generator {config.get('kind')!r}")
        return Affine(config["size"])

    monkeypatch.setattr(pyro_apd.posterior.building, "build_generator", build)


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def mixed():
    """A layout with constrained sites."""
    layout = Layout(
        {"w": (2, 3), "scale": (), "mix": (3,)}, {"scale": constraints.positive, "mix": constraints.simplex}
    )
    return DistilledPosterior(layout, Affine(layout.size), metadata={"seed": 1}, training_log={"loss": [1.0]})


def of_classifier():
    model = Classifier()
    layout = Layout.from_trace(poutine.trace(model).get_trace(X, torch.zeros(len(X), dtype=torch.int64)))
    return model, DistilledPosterior(layout, Affine(layout.size))


def test_get_samples_is_shaped_as_after_mcmc():
    posterior = mixed()
    draws = posterior.get_samples(7)
    assert {name: tuple(value.shape) for name, value in draws.items()} == {"w": (7, 2, 3), "scale": (7,), "mix": (7, 3)}
    assert bool((draws["scale"] > 0).all())
    torch.testing.assert_close(draws["mix"].sum(-1), torch.ones(7))
    assert posterior.get_samples()["w"].shape == (100, 2, 3)
    assert posterior.get_samples(4, group_by_chain=True)["mix"].shape == (1, 4, 3)
    assert not any(value.requires_grad for value in draws.values())


def test_draws_have_the_generators_law():
    draws = mixed().get_samples(20_000, seed=0)["w"].flatten(1)
    torch.testing.assert_close(draws.mean(0), torch.linspace(-1, 1, 9)[:6], atol=0.02, rtol=0)
    torch.testing.assert_close(draws.std(0), torch.full((6,), 0.5), atol=0.02, rtol=0)


def test_seed_repeats_and_leaves_the_global_generator_alone():
    posterior, before = mixed(), torch.get_rng_state()
    one, again, other = (posterior.get_samples(3, seed=seed)["w"] for seed in (5, 5, 6))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_latent_is_one_network():
    posterior = mixed()
    latent = torch.randn(4, posterior.latent_size)
    draws = posterior.sample(latent=latent)
    assert torch.equal(draws["w"], posterior.sample(latent=latent)["w"])
    assert torch.equal(draws["mix"][2], posterior.sample(latent=latent[2])["mix"])
    assert posterior.sample((2, 3))["w"].shape == (2, 3, 2, 3)
    assert posterior.sample()["scale"].shape == ()


def test_rsample_is_differentiable_in_the_latent_and_in_the_generator():
    posterior = mixed()
    latent = torch.randn(4, posterior.latent_size, requires_grad=True)
    draws = posterior.rsample(latent=latent)
    draws["w"].sum().backward()
    assert torch.equal(latent.grad, torch.tensor([0.5] * 6 + [0.0] * 3).expand(4, 9))
    assert torch.equal(posterior.generator.shift.grad, torch.tensor([4.0] * 6 + [0.0] * 3))
    torch.manual_seed(3)
    drawn = posterior.rsample((2, 3))
    assert all(value.requires_grad and value.shape[:2] == (2, 3) for value in drawn.values())
    torch.manual_seed(3)
    assert_same_draws(posterior.sample((2, 3)), drawn)
    assert_same_draws(posterior.sample(latent=latent), draws)


def assert_same_draws(plain, differentiable):
    assert not any(value.requires_grad for value in plain.values())
    for name, value in differentiable.items():
        assert torch.equal(plain[name], value)


def test_distilled_generators_are_differentiable_in_the_latent():
    """Against finite differences."""
    generator = SubspaceGenerator(24, [(0, 4, 5, 20, 0, 2)], num_chains=2, num_modes=3, rank=3, path_rank=2).double()
    values = torch.Generator().manual_seed(1)
    for tensor in generator.state_dict().values():
        tensor.copy_(torch.empty(tensor.shape).uniform_(1, 3, generator=values))
    layout = Layout({"w": (20,), "scale": (4,)}, {"scale": constraints.positive})
    posterior = DistilledPosterior(layout, generator.requires_grad_(False))
    latent = torch.randn(3, posterior.latent_size, dtype=torch.float64)

    def draws(coordinates):  # the first number chooses the mode, by steps
        return tuple(posterior.rsample(latent=torch.cat([latent[:, :1], coordinates], 1)).values())

    assert torch.autograd.gradcheck(draws, (latent[:, 1:].requires_grad_(),))


def test_device_and_dtype_are_the_generators():
    posterior = mixed()
    assert (posterior.device, posterior.dtype) == (torch.device("cpu"), torch.float32)
    doubled = posterior.to(torch.float64)
    assert (doubled.device, doubled.dtype) == (torch.device("cpu"), torch.float64)
    assert posterior.to("meta").device == torch.device("meta")


@pytest.mark.parametrize("predictive", [Predictive, VectorisedPredictive])
def test_draws_and_guide_interchange_in_predictive(predictive):
    model, posterior = of_classifier()
    from_draws = predictive(model, posterior_samples=posterior.get_samples(6))(X)
    from_guide = predictive(model, guide=posterior, num_samples=6)(X)
    assert from_draws["obs"].shape == from_guide["obs"].shape == (6, 5)
    assert set(from_guide) >= {"obs", *posterior.layout.names}
    weights = from_guide["first.weight"].reshape(6, -1)
    assert len(weights.unique(dim=0)) == 6


def test_guide_under_pyros_parallel_predictive():
    def model(x):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(slope * x, 1.0))

    posterior = DistilledPosterior(Layout({"slope": ()}), Affine(1))
    draws = Predictive(model, guide=posterior, num_samples=50, parallel=True)(torch.randn(8))
    assert len(draws["slope"].flatten().unique()) == 50
    assert draws["obs"].shape == (50, 8)


def test_trace_has_the_models_sites_and_an_auxiliary_one():
    model, posterior = of_classifier()
    trace = poutine.trace(posterior).get_trace(X, None)
    assert {name for name, site in trace.nodes.items() if site["type"] == "sample"} == {
        NOISE_SITE,
        *posterior.layout.names,
    }
    replayed = poutine.trace(poutine.replay(model, trace)).get_trace(X)
    for name in posterior.layout.names:
        assert torch.equal(replayed.nodes[name]["value"], trace.nodes[name]["value"])


def test_log_prob_says_why_there_is_none():
    with pytest.raises(NotImplementedError, match="implicit"):
        mixed().log_prob({})


@pytest.mark.parametrize("module_class", [Classifier])
def test_save_and_load_draw_the_same(tmp_path, module_class):
    posterior = mixed()
    posterior.save(tmp_path / "p.safetensors")
    again = DistilledPosterior.load(tmp_path / "p.safetensors")
    for name, value in posterior.get_samples(5, seed=1).items():
        assert torch.equal(value, again.get_samples(5, seed=1)[name])
    assert again.metadata == {"seed": 1}
    assert again.training_log == {"loss": [1.0]}
    assert posterior.num_bytes == again.num_bytes == (tmp_path / "p.safetensors").stat().st_size


def test_dtype_follows_to(tmp_path):
    posterior = mixed().to(torch.float64)
    assert posterior.get_samples(2)["w"].dtype == torch.float64
    posterior.save(tmp_path / "p")
    assert DistilledPosterior.load(tmp_path / "p").get_samples(2)["mix"].dtype == torch.float64


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_rounded_is_what_a_file_would_draw(tmp_path, dtype):
    layout = Layout({"w": (90, 100)})
    posterior = DistilledPosterior(layout, PaperGenerator(layout.size, 3, 16), metadata={"seed": 1})
    rounded, before = posterior.rounded(dtype), posterior.get_samples(3, seed=1)["w"]
    posterior.save(tmp_path / "p", dtype)
    loaded = DistilledPosterior.load(tmp_path / "p")
    assert torch.equal(rounded.get_samples(3, seed=1)["w"], loaded.get_samples(3, seed=1)["w"])
    assert rounded.num_bytes == loaded.num_bytes == (tmp_path / "p").stat().st_size
    assert rounded.storage_dtype == loaded.storage_dtype == dtype
    assert rounded.metadata == {"seed": 1}
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "p").read_bytes()
    assert torch.equal(posterior.get_samples(3, seed=1)["w"], before)


def test_storage_dtype_is_what_save_and_num_bytes_follow(tmp_path):
    layout = Layout({"w": (90, 100)})
    posterior = DistilledPosterior(layout, PaperGenerator(layout.size, 3, 16), storage_dtype="int8")
    small = posterior.num_bytes
    posterior.save(tmp_path / "small")
    posterior.save(tmp_path / "large", "float32")
    wide = DistilledPosterior(layout, posterior.generator)
    assert (tmp_path / "small").stat().st_size == small < 0.4 * wide.num_bytes
    assert (tmp_path / "large").stat().st_size == wide.num_bytes
    for refused in (
        lambda: DistilledPosterior(layout, posterior.generator, storage_dtype="float64"),
        lambda: posterior.save(tmp_path / "none", "half"),
        lambda: posterior.rounded("int2"),
    ):
        with pytest.raises(ValueError, match="must be one of 'float32', 'float16', 'bfloat16', 'int8'"):
            refused()
    assert not (tmp_path / "none").exists()


def test_loading_leaves_random_numbers_alone(tmp_path):
    layout = Layout({"w": (3, 4)})
    DistilledPosterior(layout, PaperGenerator(layout.size, 3, 4)).save(tmp_path / "p")
    before = torch.get_rng_state()
    DistilledPosterior.load(tmp_path / "p")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sizes", [(4, 7, 3), (5, 6, 3)])
def test_predicting_with_another_model_is_refused(sizes):
    _, posterior = of_classifier()
    with pytest.raises(ValueError, match=r"another model.*first\.weight"):
        VectorisedPredictive(Classifier(sizes), guide=posterior, num_samples=3)(torch.randn(5, sizes[0]))


@pytest.mark.parametrize("config", [{"kind": "nonsense"}, {}, {"kind": "affine", "size": 4}, {"kind": "affine"}])
def test_file_whose_generator_cannot_be_built(tmp_path, config):
    posterior = mixed()
    contents = posterior._artifact()
    pyro_apd.posterior.artifact.write(type(contents)(**{**vars(contents), "generator": config}), tmp_path / "p")
    with pytest.raises(ArtifactError):
        DistilledPosterior.load(tmp_path / "p")


def test_generator_and_layout_must_agree():
    with pytest.raises(ValueError, match="gives 4 numbers per draw, but the layout has 3"):
        DistilledPosterior(Layout({"w": (3,)}), Affine(4))


@pytest.mark.parametrize("num_samples", [0, -1, 2.5, True])
def test_unusable_numbers_of_draws(num_samples):
    with pytest.raises(ValueError, match="num_samples="):
        mixed().get_samples(num_samples)


def test_unusable_latents():
    posterior = mixed()
    with pytest.raises(ValueError, match="last dimension must be 9"):
        posterior.sample(latent=torch.zeros(3))
    with pytest.raises(ValueError, match="leave `sample_shape` out"):
        posterior.sample((2,), latent=torch.zeros(9))


def test_arviz_reads_it():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz as az
    draws = mixed().get_samples(10, group_by_chain=True)
    idata = az.from_dict({name: value.numpy() for name, value in draws.items()})
    assert idata.posterior["mix"].shape == (1, 10, 3)


def test_global_state():
    model, posterior = of_classifier()
    VectorisedPredictive(model, guide=posterior, num_samples=3)(X)
    assert not list(pyro.get_param_store().keys())
    pickle.loads(pickle.dumps(posterior.layout))


def test_guide_for_svi_is_refused_with_the_reason():
    """SVI would take a guide of Deltas without an error, and train nothing that means anything."""
    model, posterior = of_classifier()
    labels = torch.zeros(len(X), dtype=torch.int64)
    svi = SVI(model, posterior, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    with pytest.raises(NotImplementedError, match="implicit"):
        svi.step(X, labels)
    with pytest.raises(NotImplementedError, match="implicit"):
        WeighedPredictive(model, guide=posterior, num_samples=2)(X, labels)


@pytest.mark.parametrize("num_samples", [1, 0, 2.5])
def test_estimates_need_draws(num_samples):
    posterior = mixed()
    for estimate in (posterior.median, lambda n: posterior.quantiles(0.5, n)):
        with pytest.raises(ValueError, match="must be an integer >= 2"):
            estimate(num_samples)


def test_estimates_are_of_the_generators_law():
    posterior = mixed()
    median = posterior.median(4000, seed=0)
    exact = torch.linspace(-1, 1, 9)[:6].reshape(2, 3)
    assert bool(((median["w"] - exact).abs() < 5 * median.error["w"]).all())
    assert torch.equal(posterior.median(100, seed=1)["mix"], posterior.median(100, seed=1)["mix"])


def test_a_stream_is_what_get_samples_gives():
    posterior = mixed()
    stream, draws = posterior.stream(7, seed=2), posterior.get_samples(7, seed=2)
    assert len(stream) == 7
    assert "mix" in stream
    for name, value in stream.part(2, 5).items():
        assert torch.equal(value, draws[name][2:5])
        assert torch.equal(value, stream.part(2, 5)[name])


def test_the_global_generator_is_not_used_where_there_is_a_seed(monkeypatch):
    """Not even for a while, in which another thread may draw from it."""
    posterior = mixed()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    unchanged = []
    forward = Affine.forward

    def watched(self, latent):
        unchanged.append(torch.equal(torch.get_rng_state(), state))
        return forward(self, latent)

    monkeypatch.setattr(Affine, "forward", watched)
    draws = posterior.get_samples(4, seed=1)
    posterior.median(4, seed=1)
    part = posterior.stream(4, seed=1).part(1, 3)
    assert all(unchanged)
    assert len(unchanged) == 3
    assert all(torch.equal(part[name], draws[name][1:3]) for name in draws)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [PaperGenerator, LowRankGenerator])
def test_autocast_around_makes_no_difference_to_draws(kind, tmp_path):
    torch.manual_seed(0)
    generator = kind(9, 4) if kind is LowRankGenerator else kind(9)
    for parameter in generator.parameters():
        nn.init.normal_(parameter)
    posterior = DistilledPosterior(Layout({"weight": (2, 3), "bias": (3,)}), generator)
    latent = torch.randn(5, posterior.latent_size)

    def drawn():
        posterior.save(tmp_path / "file")
        loaded = DistilledPosterior.load(tmp_path / "file")
        made = [loaded.sample(latent=latent), posterior.rsample(latent=latent), posterior.get_samples(3, seed=0)]
        made += [posterior.stream(3, seed=0).part(0, 3), posterior.median(10, seed=0)]
        return [value for draws in made for value in draws.values()]

    expected = drawn()
    with torch.autocast("cpu", torch.bfloat16):
        found = drawn()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))
