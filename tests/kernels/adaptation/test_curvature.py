# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Curvature by differences of gradients, on quadratics where it is known."""

import pytest
import torch

from pyro_apd.kernels.adaptation.curvature import dense_hessian, hessian_product, lanczos, largest_curvature

EIGENVALUES = torch.tensor([0.5, 1.0, 3.0, 10.0, 40.0, 250.0], dtype=torch.float64)
BASIS = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
HESSIAN = BASIS @ EIGENVALUES.diag() @ BASIS.T
THETA = torch.arange(6, dtype=torch.float64)


def gradient(theta):
    return (theta - 1.0) @ HESSIAN


def product(direction):
    return hessian_product(gradient, THETA, direction)


def test_product_is_that_of_the_hessian():
    direction = torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(product(direction), HESSIAN @ direction)
    assert torch.equal(product(torch.zeros(6, dtype=torch.float64)), torch.zeros(6, dtype=torch.float64))


def test_dense_hessian():
    torch.testing.assert_close(dense_hessian(product, THETA), HESSIAN)


def test_lanczos_with_all_steps_is_exact():
    start = torch.randn(6, dtype=torch.float64)
    seen = lanczos(product, start, 10)
    torch.testing.assert_close(seen.nodes, EIGENVALUES)
    torch.testing.assert_close(seen.weights, (BASIS.T @ start).square())
    torch.testing.assert_close(seen.largest, EIGENVALUES[-1])
    inverse = (seen.weights / seen.nodes).sum()
    torch.testing.assert_close(inverse, start @ torch.linalg.solve(HESSIAN, start))


def test_lanczos_survives_an_invariant_subspace():
    """From two eigenvectors there are two curvatures to see, and the rest must weigh nothing."""
    seen = lanczos(product, BASIS[:, 1] + 2 * BASIS[:, 4], 6)
    kept = seen.weights > 0
    torch.testing.assert_close(seen.nodes[kept], EIGENVALUES[[1, 4]])
    torch.testing.assert_close(seen.weights[kept], torch.tensor([1.0, 4.0], dtype=torch.float64))


def test_lanczos_finds_the_largest_curvature_of_many_in_few_steps():
    diagonal = torch.cat([torch.rand(500), torch.tensor([80.0, 100.0])])
    seen = lanczos(lambda v: diagonal * v, torch.randn(502), 8)
    assert abs(float(seen.largest) - 100) < 0.5
    # The curvature of the bulk, and of everything, by the quadrature.
    assert abs(float((seen.weights * seen.nodes).sum() / seen.weights.sum()) * 502 / float(diagonal.sum()) - 1) < 0.6


def test_chains_are_measured_by_themselves():
    scale = torch.tensor([1.0, 3.0], dtype=torch.float64).unsqueeze(-1)
    start = torch.randn(2, 6, dtype=torch.float64)
    both = lanczos(lambda v: scale * (v @ HESSIAN), start, 6)
    for c in range(2):
        alone = lanczos(lambda v, c=c: scale[c] * (HESSIAN @ v), start[c], 6)
        torch.testing.assert_close(both.nodes[c], alone.nodes)
        torch.testing.assert_close(both.weights[c], alone.weights)
    dense = dense_hessian(lambda v: scale * (v @ HESSIAN), start)
    torch.testing.assert_close(dense[1], 3 * HESSIAN)


def test_largest_curvature():
    start = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert float(largest_curvature(product, start, 6)) == pytest.approx(250.0, rel=1e-5)
    assert float(largest_curvature(lambda v: -product(v), start, 6)) == pytest.approx(250.0, rel=1e-5)
    assert 200 < float(largest_curvature(product, start, 2)) <= 250.1


def test_a_product_that_is_not_finite_gives_nan():
    assert torch.isnan(largest_curvature(lambda v: v * torch.nan, torch.ones(2, 6), 6)).all()
