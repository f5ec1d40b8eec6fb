# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Files of every format version that was released, which must be read indefinitely. Add files, never replace them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pyro_apd.posterior import artifact
from pyro_apd.posterior.posterior import DistilledPosterior

FILES = Path(__file__).parents[1] / "files"
# How far the precision of the file moves a draw.
TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2, "int8": 3e-2}


def latents(posterior, count):
    """Those of the draws beside the files."""
    return torch.linspace(-1.5, 1.5, count * posterior.latent_size).reshape(count, -1)


def assert_draws(posterior, expected, tolerance=1e-6):
    draws = posterior.sample(latent=latents(posterior, len(next(iter(expected.values())))))
    assert set(draws) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(draws[name], value, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_version_2(dtype):
    path = FILES / f"posterior_v2_{dtype}.safetensors"
    posterior = DistilledPosterior.load(path)
    assert_draws(posterior, load_file(FILES / "draws_v2.safetensors"), TOLERANCE[dtype])
    assert posterior.metadata == {"seed": 7, "notes": "second format"}
    assert posterior.storage_dtype == dtype
    assert posterior.generator.layers[-1].weight.dtype == torch.float32
    assert artifact.read_description(path).format == 2


@pytest.mark.parametrize("name", ["coordinates_float32", "coordinates_int8", "chunked_int8"])
def test_version_2_of_generators_that_are_no_longer_fitted(name, tmp_path):
    """Noise, a perceptron, covariances that modes share, and scales by row and chunk."""
    posterior = DistilledPosterior.load(FILES / f"posterior_v2_{name}.safetensors")
    expected = {
        key.removeprefix(f"{name}."): value
        for key, value in load_file(FILES / "draws_v2_coordinates.safetensors").items()
        if key.startswith(name)
    }
    if name == "chunked_int8":  # its noise is torch's, which on other processors are other numbers
        latent_SL = latents(posterior, 2)
        noisy = posterior.generator(latent_SL)
        for module in posterior.generator.noise:
            module.row_scale.zero_()
        assert (posterior.generator(latent_SL) - noisy).abs().max() > 0.1
    assert_draws(posterior, expected)
    posterior.save(tmp_path / "p")
    assert artifact.read_description(tmp_path / "p").format == artifact.FORMAT_VERSION
    assert_draws(DistilledPosterior.load(tmp_path / "p"), expected)


def test_version_3():
    posterior = DistilledPosterior.load(FILES / "posterior_v3_subspace_int8.safetensors")
    assert_draws(posterior, load_file(FILES / "draws_v3.safetensors"))
    assert posterior.metadata == {"seed": 3, "notes": "third format"}
    assert posterior.generator.parts[0].basis.dtype == torch.int16


def test_precisions_differ_in_size():
    sizes = [(FILES / f"posterior_v2_{dtype}.safetensors").stat().st_size for dtype in ("float32", "float16", "int8")]
    assert sizes[0] > 1.6 * sizes[1] > 2.1 * sizes[2]


def test_a_file_saved_again_has_the_same_contents(tmp_path):
    for name in ("posterior_v2_int8", "posterior_v3_subspace_int8"):
        path = FILES / f"{name}.safetensors"
        DistilledPosterior.load(path).save(tmp_path / "p")
        again, original = artifact.read_description(tmp_path / "p"), artifact.read_description(path)
        assert again.generator == original.generator
        assert artifact.read_table(tmp_path / "p") == artifact.read_table(path)
