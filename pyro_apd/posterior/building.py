# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Generators from the contents of a file, and checks of what they draw."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_apd.errors import ArtifactError
from pyro_apd.generators import Generator, build_generator
from pyro_apd.models.layout import Layout
from pyro_apd.posterior import artifact
from pyro_apd.posterior.artifact import Artifact

# No draw of a file may come this near to the largest number of its dtype, as a factor.
_HEADROOM = 1e8
# Draws of which values are checked: up to so many, of so many numbers in all.
_NUM_DRAWS, _NUM_NUMBERS = 16, 2**18


def load(path: str | os.PathLike[str]) -> tuple[Artifact, Generator]:
    """The contents of a file, and its generator, which was checked to draw what the file describes.

    :raises ArtifactError: if the file is truncated, damaged, of another kind or version, or its draws are not finite.
    :raises FileNotFoundError: if there is none.
    """
    built: list[Generator] = []

    def expected(config: dict[str, Any]) -> Mapping[str, Tensor]:
        built.append(_without_memory(config))
        return built[0].state_dict()

    contents = artifact.read(path, expected)
    try:
        generator = _filled(built[0], contents)
        _check_draws(contents.layout, generator)
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, AttributeError, OverflowError) as error:
        raise ArtifactError(f"{path} describes a posterior that cannot be built: {error}") from error
    return contents, generator


def build(contents: Artifact) -> Generator:
    """The generator of an artifact, with the artifact's tensors as its own."""
    return _filled(_without_memory(contents.generator), contents)


def _without_memory(config: Mapping[str, Any]) -> Generator:
    """On the meta device, since the generator takes the tensors of the file."""
    with torch.device("meta"):
        return build_generator(config)


def _filled(generator: Generator, contents: Artifact) -> Generator:
    """The generator with tensors of the artifact, in the dtype in which it computed before it was saved."""
    dtype = None if contents.compute_dtype is None else getattr(torch, contents.compute_dtype)
    # One by one, since the time that load_state_dict takes is quadratic in the number of modules.
    for prefix, module in generator.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, there in own:
            value = contents.tensors[f"{prefix}.{name}" if prefix else name].detach()
            if dtype is not None and value.is_floating_point():
                value = value.to(dtype)
            setattr(module, name, nn.Parameter(value, False) if isinstance(there, nn.Parameter) else value)
    return generator.eval()


@torch.no_grad()
def _check_draws(layout: Layout, generator: Generator) -> None:
    """Raises ValueError unless draws have the shapes of the sites, and are finite for any latent."""
    like = next((v for v in generator.state_dict().values() if v.is_floating_point()), torch.zeros(())).new_zeros(())
    largest = math.inf if like.dtype == torch.float16 else torch.finfo(like.dtype).max / _HEADROOM
    bound = generator.bound()
    if not bound <= largest:
        raise ValueError(f"its draws may be as large as {bound:.3g}, too near to the largest {like.dtype}.")
    count = 1 + min(_NUM_DRAWS, _NUM_NUMBERS // max(1, generator.output_size))
    latent_SL = torch.randn(count, generator.latent_size, generator=torch.Generator().manual_seed(0))
    latent_SL[0] = 0
    theta_SD = generator(latent_SL.to(like))
    if theta_SD.shape != (count, layout.size):
        raise ValueError(f"its draws have shape {tuple(theta_SD.shape[1:])}, and sites take {layout.size} numbers.")
    values = layout.constrain(theta_SD)
    sizes = {name: tuple(value.shape[1:]) for name, value in values.items()}
    unlike = {site.name: sizes[site.name] for site in layout if sizes[site.name] != site.shape}
    if unlike:
        raise ValueError(f"its draws have shapes {unlike}.")
    wrong = [name for name, value in values.items() if not bool(value.isfinite().all())]
    if wrong:
        raise ValueError(f"its draws of site '{wrong[0]}' are NaN or infinite.")
