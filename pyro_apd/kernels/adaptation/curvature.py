# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Curvature of a potential, measured by differences of its gradient: products with the Hessian, and its spectrum.

Nothing here differentiates twice, so that every model that can be sampled can be measured. Leading dimensions of
``theta`` are chains; each is measured separately.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Gradient of U ``(..., D)`` at ``(..., D)``, on the same data at each call.
Gradient = Callable[[Tensor], Tensor]

# Length of finite differences, relative to the size of theta: rounding and third derivatives both stay small.
_REACH = 1e-3


@dataclass(frozen=True)
class Spectrum:
    """Curvatures, and the weight of a starting vector along each: a Gauss quadrature of the Hessian's spectrum.

    For a starting vector z and any function f, the sum of ``weights * f(nodes)`` approximates z' f(H) z.

    :ivar Tensor nodes: curvatures ``(..., K)``, ascending, float64 on the CPU.
    :ivar Tensor weights: ``(..., K)``, at least 0; they sum to the squared norm of the starting vector.
    """

    nodes: Tensor
    weights: Tensor

    @property
    def largest(self) -> Tensor:
        """Largest absolute curvature with a weight, ``(...)``."""
        return torch.where(self.weights > 0, self.nodes.abs(), 0.0).amax(-1)


def hessian_product(gradient: Gradient, theta: Tensor, direction: Tensor) -> Tensor:
    """The Hessian of U at ``theta`` ``(..., D)`` times ``direction`` ``(..., D)``, by central differences."""
    norm = direction.norm(dim=-1, keepdim=True)
    # The product with a zero direction is zero.
    safe = torch.where(norm > 0, norm, 1.0)
    reach = _REACH * (1.0 + theta.norm(dim=-1, keepdim=True))
    offset = direction * (reach / safe)
    product: Tensor = (gradient(theta + offset) - gradient(theta - offset)) * (norm / (2 * reach))
    return product


def largest_curvature(product: Callable[[Tensor], Tensor], start: Tensor, num_products: int) -> Tensor:
    """Largest absolute curvature ``(...)`` of a symmetric operator, from below; nan where a product is not finite.

    It is the largest Ritz value of :func:`lanczos`, which needs fewer products than a power iteration.

    :param product: the operator, ``(..., D)`` to ``(..., D)``.
    :param start: vectors ``(..., D)`` to start from, random ones.
    """
    return lanczos(product, start, num_products).largest


def lanczos(product: Callable[[Tensor], Tensor], start: Tensor, num_steps: int) -> Spectrum:
    """The spectrum of a symmetric operator as seen from ``start`` ``(..., D)``, by Lanczos iteration.

    Vectors are orthogonalised against all before: rounding would otherwise repeat the largest curvatures. Waits for the
    device once, at the end.

    :param product: the operator, ``(..., D)`` to ``(..., D)``.
    :param int num_steps: products to take; no more than D are.
    """
    norm = start.norm(dim=-1)
    basis = [start / torch.where(norm > 0, norm, 1.0).unsqueeze(-1)]
    diagonal, off_diagonal = [], []
    scale = torch.zeros_like(norm)
    for _ in range(min(num_steps, start.shape[-1])):
        image = product(basis[-1])
        diagonal.append((image * basis[-1]).sum(-1))
        scale = torch.maximum(scale, image.norm(dim=-1))
        for _ in range(2):
            for vector in basis:
                image = image - (image * vector).sum(-1, keepdim=True) * vector
        rest = image.norm(dim=-1)
        # An invariant subspace is found: go on with zeros, which have no weight.
        rest = torch.where(rest > 1e-5 * scale, rest, 0.0)
        off_diagonal.append(rest)
        basis.append(image * torch.where(rest > 0, 1.0 / torch.where(rest > 0, rest, 1.0), 0.0).unsqueeze(-1))
    below = torch.stack(off_diagonal[:-1], -1) if len(off_diagonal) > 1 else norm.new_zeros((*norm.shape, 0))
    main = torch.stack(diagonal, -1).double().cpu()
    below = below.double().cpu()
    matrix = torch.diag_embed(main) + torch.diag_embed(below, 1) + torch.diag_embed(below, -1)
    # LAPACK raises where entries are not finite.
    is_finite = torch.isfinite(matrix).all(-1).all(-1, keepdim=True)
    nodes, vectors = torch.linalg.eigh(torch.where(is_finite.unsqueeze(-1), matrix, 0.0))
    nodes = torch.where(is_finite, nodes, torch.nan)
    weights = vectors[..., 0, :].square()
    weights = torch.where(weights > 1e-12, weights, 0.0) * norm.double().cpu().square().unsqueeze(-1)
    return Spectrum(nodes, weights)


def dense_hessian(product: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The whole operator as a symmetric matrix ``(..., D, D)``, float64 on the CPU, by D products.

    :param like: any tensor ``(..., D)`` of the device and dtype to work in.
    """
    columns = []
    for i in range(like.shape[-1]):
        unit = torch.zeros_like(like)
        unit[..., i] = 1.0
        columns.append(product(unit))
    matrix = torch.stack(columns, -1).double().cpu()
    return (matrix + matrix.mT) / 2
