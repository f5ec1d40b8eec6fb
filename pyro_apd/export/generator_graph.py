# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Generators in operations that ONNX has, with their tensors as arguments.

A program gets the tensors as the file has them, decodes them, and draws from them. Of a subspace generator two things
differ from its own ``forward``: entries of a draw are joined, not written in place, and the duals of frames come from
products of matrices, as ONNX solves no equations.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyro_apd.generators import Generator, SubspaceGenerator
from pyro_apd.generators.subspace import MatrixPart

# Iterations until an inverse is exact, for a condition number of one.
_FINAL_ITERATIONS = 7
_MOST_ITERATIONS = 60


class GeneratorGraph(nn.Module):
    """Draws ``(S, D)`` from latents ``(S, L)`` and the tensors of a generator by name.

    :param Generator generator: is copied.
    """

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = copy.deepcopy(generator).requires_grad_(False)
        #: Parameters and buffers of the generator, by name.
        self.tensors: dict[str, Tensor] = dict(generator.state_dict())
        self._iterations = {
            name: _num_iterations(part)
            for name, part in generator.named_modules()
            if isinstance(part, MatrixPart) and isinstance(generator, SubspaceGenerator)
        }

    def draw(self, tensors: Mapping[str, Tensor], latent_SL: Tensor) -> Tensor:
        """Draws ``(S, D)`` of a generator with these tensors."""
        named = {f"generator.{name}": value for name, value in tensors.items()}
        draws_SD: Tensor = torch.func.functional_call(self, named, (latent_SL,))
        return draws_SD

    def forward(self, latent_SL: Tensor) -> Tensor:
        """Draws ``(S, D)``, with the tensors that the generator has."""
        if not isinstance(self.generator, SubspaceGenerator):
            return self.generator(latent_SL)  # type: ignore[no-any-return]
        pieces, start = _Pieces(len(latent_SL)), 1 + self.generator.rank
        drawn = self.generator.coordinates(latent_SL)
        names = {id(module): name for name, module in self.generator.named_modules()}
        for part in self.generator.parts_in_order():
            part.forget()
            if isinstance(part, MatrixPart):
                part.keep_dual(_dual(part, self._iterations[names[id(part)]]))
            stop = start + part.latent_size
            noise_SL = latent_SL[:, start:stop]
            part.write(cast(Tensor, pieces), drawn, noise_SL, self.generator.step, self.generator.noise_cap)
            part.forget()
            start = stop
        return pieces.joined()


class _Pieces:
    """Collects what is written into a matrix of draws, and joins it."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._found: list[tuple[int, Tensor]] = []

    def __len__(self) -> int:
        return self._count

    def __setitem__(self, index: Any, value_SW: Tensor) -> None:
        if index[1].start is not None:
            self._found.append((index[1].start, value_SW))

    def joined(self) -> Tensor:
        """The draws."""
        return torch.cat([value for _, value in sorted(self._found, key=lambda found: found[0])], 1)


def _gram(part: MatrixPart) -> tuple[Tensor, Tensor]:
    """The frame in double precision, and its products of rows, as :meth:`MatrixPart.frames` solves with them."""
    dtype = part.frame_step.dtype
    frame_KI = (part.frame.to(dtype) * part.frame_step.detach()).double()
    gram_KK = frame_KI @ frame_KI.mT
    identity_KK = torch.eye(len(frame_KI), dtype=gram_KK.dtype, device=gram_KK.device)
    mean = (gram_KK * identity_KK).sum() / len(frame_KI)
    return frame_KI, gram_KK + 1e-12 * mean.clamp(min=1e-300) * identity_KK


def _num_iterations(part: MatrixPart) -> int:
    """Iterations of :func:`_dual` that are exact for a frame."""
    eigenvalues = torch.linalg.eigvalsh(_gram(part)[1])
    condition = float(eigenvalues[-1] / eigenvalues[0].clamp(min=1e-300)) * len(eigenvalues)
    return min(_MOST_ITERATIONS, _FINAL_ITERATIONS + math.ceil(math.log2(max(1.0, condition))))


def _dual(part: MatrixPart, iterations: int) -> Tensor:
    """The dual of a frame ``(K, I)``: its products' inverse by Newton's iteration (Schulz, 1933), times the frame."""
    frame_KI, gram_KK = _gram(part)
    identity_KK = torch.eye(len(frame_KI), dtype=gram_KK.dtype, device=gram_KK.device)
    inverse_KK = identity_KK / gram_KK.abs().sum(1).amax(0)
    for _ in range(iterations):
        inverse_KK = inverse_KK @ (2 * identity_KK - gram_KK @ inverse_KK)
    return (inverse_KK @ frame_KI).to(part.frame_step.dtype)
