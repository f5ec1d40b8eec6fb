# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Posteriors from files: their dtype, and refusals of files that would draw infinities or fill memory."""

import os

import pytest
import torch
from torch.distributions import constraints

from pyro_apd.errors import ArtifactError
from pyro_apd.generators import (
    DropoutGenerator,
    LowRankGenerator,
    PaperGenerator,
    SubspaceGenerator,
    build_generator,
)
from pyro_apd.models.layout import Layout
from pyro_apd.posterior import artifact, building
from pyro_apd.posterior.posterior import DistilledPosterior

EARLIER = {"output_size": 130, "rank": 3, "num_modes": 2, "noise": [[0, 4, 16, 2], [64, 4, 16, 1]], "bend": 4}
MATRICES = [(0, 4, 16, 64, 0, 5), (68, 3, 20, -1, 1, 20)]
MAKE = {
    "coordinates": lambda: build_generator({"kind": "coordinates", **EARLIER}),
    "chunked": lambda: build_generator({"kind": "chunked", "chunks": [64, 64, 2], **EARLIER}),
    "subspace": lambda: SubspaceGenerator(130, MATRICES, num_chains=2, num_modes=3, rank=4, path_rank=2),
    "subspace with scales": lambda: SubspaceGenerator(
        130, [(*matrix, 1, 1) for matrix in MATRICES], num_chains=2, num_modes=3, rank=4, path_rank=2
    ),
    "paper": lambda: PaperGenerator(130, 4, 90),
    "dropout": lambda: DropoutGenerator(130, [(0, 4, 16, 1)]),
    "low-rank": lambda: LowRankGenerator(130, 2),
}


def posterior(kind, dtype=torch.float32, layout=None):
    generator = MAKE[kind]().to(dtype)
    values = torch.Generator().manual_seed(0)
    for tensor in generator.state_dict().values():
        random = torch.randn(tensor.shape, generator=values, dtype=torch.float64)
        tensor.copy_(0.3 * random if tensor.is_floating_point() else (40 * random).clamp(-127, 127))
    for name, tensor in generator.named_buffers():
        if name.endswith("exponents"):
            tensor.clamp_(-3, 3)
    return DistilledPosterior(layout or Layout({"w": (130,)}), generator)


@pytest.mark.parametrize("storage_dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", MAKE)
def test_draws_come_back_in_the_dtype_of_the_model(tmp_path, kind, storage_dtype):
    for dtype in (torch.float64, torch.float32):
        original = posterior(kind, dtype)
        original.save(tmp_path / "p", dtype=storage_dtype)
        loaded = DistilledPosterior.load(tmp_path / "p")
        assert loaded.dtype == original.rounded(storage_dtype).dtype == dtype
        draws = loaded.get_samples(3, seed=0)["w"]
        assert draws.dtype == dtype
        assert torch.equal(draws, original.rounded(storage_dtype).get_samples(3, seed=0)["w"])
        before = (tmp_path / "p").read_bytes()
        loaded.save(tmp_path / "p")
        assert (tmp_path / "p").read_bytes() == before


@pytest.mark.parametrize("kind", MAKE)
def test_no_draw_exceeds_the_bound_of_its_generator(kind):
    generator = posterior(kind).generator
    latent_SL = torch.randn(200, generator.latent_size, generator=torch.Generator().manual_seed(1)).clamp(-8, 8)
    latent_SL[:4] = torch.tensor([-8.0, 8.0, 0.0, 1.0])[:, None]
    with torch.no_grad():
        largest = float(generator(latent_SL).abs().max())
    assert largest <= generator.bound() < 1e12


@pytest.mark.parametrize("kind", MAKE)
def test_weights_near_the_largest_number_are_refused(tmp_path, kind):
    layout, dtype = Layout({"w": (130,)}), torch.float32
    for name, tensor in posterior(kind).generator.state_dict().items():
        if not tensor.is_floating_point() or name.endswith(
            ("unit", "reduction", "noise_cap")
        ):  # these make draws smaller
            continue
        wild = posterior(kind, dtype, layout)
        wild.generator.state_dict()[name].view(-1)[-1] = 3e38
        wild.save(tmp_path / "p")
        with pytest.raises(ArtifactError, match=r"as large as .*, too near to the largest torch\.float32|NaN or inf"):
            DistilledPosterior.load(tmp_path / "p")


@pytest.mark.parametrize(("location", "is_refused"), [(80.0, False), (95.0, True), (-200.0, False)])
def test_infinite_values_of_constrained_sites_are_refused(tmp_path, location, is_refused):
    layout = Layout({"w": (128,), "scale": (2,)}, {"scale": constraints.positive})
    wild = posterior("low-rank", layout=layout)
    wild.generator.location.data[-1] = location
    wild.generator.scale.data.fill_(0.1)
    wild.save(tmp_path / "p")
    if is_refused:
        with pytest.raises(ArtifactError, match="draws of site 'scale' are NaN or infinite"):
            DistilledPosterior.load(tmp_path / "p")
    else:
        assert bool(DistilledPosterior.load(tmp_path / "p").get_samples(50)["scale"].isfinite().all())


def test_draws_by_default_that_fill_the_memory_are_neither_written_nor_read(tmp_path, monkeypatch):
    many = posterior("low-rank")
    many.num_samples = 500_000
    many.save(tmp_path / "p")
    assert DistilledPosterior.load(tmp_path / "p").num_samples == 500_000
    many.num_samples = 1_000_000
    with pytest.raises(ValueError, match=r"num_samples is 1,000,000: draws by default would take 520 MB.*Set"):
        many.save(tmp_path / "q")
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "_endless_draws", lambda *args: None)
        many.save(tmp_path / "q")
    with pytest.raises(ArtifactError, match="num_samples is 1,000,000"):
        DistilledPosterior.load(tmp_path / "q")


def test_a_pipe_a_device_and_a_folder_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(ArtifactError, match="not a file"):
            DistilledPosterior.load(path)
        with pytest.raises(ArtifactError, match="not a file"):
            artifact.read_description(path)


def test_many_modules_are_filled_in_time_proportional_to_their_number(monkeypatch):
    """``load_state_dict`` takes time in proportion to its square."""
    many = posterior("coordinates")
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)
    built = building.build(many._artifact())
    assert all(torch.equal(v, built.state_dict()[n]) for n, v in many.generator.state_dict().items())
    assert not any(p.requires_grad for p in built.parameters())


def test_blocks_that_a_file_cannot_hold_are_refused_before_they_are_built(tmp_path, monkeypatch):
    original = posterior("coordinates")
    original.save(tmp_path / "p")
    monkeypatch.setattr(building, "build_generator", None)
    for entries in ([[i, 1, 1, 1] for i in range(100)], [[0, 1, 1, 1]] * 3000):
        config = {**original.generator.config, "noise": entries}
        monkeypatch.setattr(type(original.generator), "config", property(lambda self, config=config: config))
        original.save(tmp_path / "p")
        with pytest.raises(ArtifactError, match=r"generator with [13],?\d* entries in 'noise', too many for 1 sites"):
            DistilledPosterior.load(tmp_path / "p")
