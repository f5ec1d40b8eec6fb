# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What tells one posterior from another: prior and likelihood at a fixed point, on fixed rows."""

from __future__ import annotations

import copy
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_apd.data.loader import LoaderBatches
from pyro_apd.data.minibatch import MinibatchSource
from pyro_apd.models.layout import Layout
from pyro_apd.models.potential import Inputs, Potential
from pyro_apd.runtime.global_state import seeded

# Largest values of the fixed point relative to 1 / sqrt(number of inputs). With the first, of variance 1, layers pass
# on signals of about the size that they get, and do not amplify rounding. Smaller where the potential is not finite.
_SIZES = (3**0.5, 0.1, 0.0)


def fixed_point_values(potential: Potential, like: Tensor) -> dict[str, Any]:
    """Values and gradients of -log prior and of -log likelihood, both with the Jacobian of the constraints.

    The point does not depend on the machine, the device or the number of processes, nor do the rows: they are the first
    batch of a fixed seed. So the values of the same model and data agree up to rounding. The chain's batches and all
    random generators are as they were.

    :param potential: of a chain that has taken no step.
    :param like: a tensor of the chain's dtype and device.
    :returns: ``{"prior": part, "likelihood": part}``, JSON values. A part has the ``energy``, the ``length`` of the
        point, and by site the norm of the ``gradient`` and its component along the point. The likelihood is None where
        the source gives other rows each time, as a loader does that augments them.
    """
    probe = copy.copy(potential)
    with seeded(0, like.device):
        probe.source, inputs = _first_batch(potential.source, like.device)
        _, again = _first_batch(potential.source, like.device)
        prior = probe.prior_alone(inputs)
        for size in _SIZES:
            point = _fixed_point(potential.layout, size).to(like)
            of_prior = _measured(prior, point, ())
            total = _measured(probe, point, inputs)
            if all(bool(torch.isfinite(value).all()) for value in (*of_prior, *total)):
                break
    is_same = all(torch.equal(one, other) for one, other in zip(inputs, again, strict=True))
    of_likelihood = tuple(whole - part for whole, part in zip(total, of_prior, strict=True))
    return {
        "prior": _part(potential.layout, point, *of_prior),
        "likelihood": _part(potential.layout, point, *of_likelihood) if is_same else None,
    }


def _first_batch(source: MinibatchSource, device: torch.device) -> tuple[MinibatchSource, Inputs]:
    """The source, restarted with a fixed seed on the host, and its first batch."""
    restarted = copy.copy(source)
    restarted.prefetch = 0
    restarted.start(torch.Generator().manual_seed(0))
    own = restarted.own_generators if isinstance(restarted, LoaderBatches) else []
    states = [generator.get_state() for generator in own]
    try:
        for generator in own:
            generator.manual_seed(0)
        return restarted, tuple(values.to(device) for values in restarted.draw())
    finally:
        for generator, state in zip(own, states, strict=True):
            generator.set_state(state)


def _fixed_point(layout: Layout, size: float) -> Tensor:
    """``(D,)``, uniform within ``size`` / sqrt(number of inputs), which is taken as the larger side of a matrix."""
    generator = torch.Generator().manual_seed(0)
    pieces = []
    for site in layout:
        shape = site.unconstrained_shape
        num_inputs = site.size / min(shape) if len(shape) > 1 and site.size else site.size
        # Uniform numbers are the same to the last bit on all machines; normal ones are not.
        values = torch.rand(site.size, generator=generator, dtype=torch.float32) * 2 - 1
        pieces.append(values * (size / max(num_inputs, 1) ** 0.5))
    return torch.cat(pieces)


def _measured(potential: Potential, point: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """U ``()`` and its gradient ``(D,)``, in double precision."""
    with torch.enable_grad(), pyro.validation_enabled(False):
        theta = point.clone().requires_grad_()
        energy = potential.value(theta, inputs)
        gradient = torch.zeros_like(point)
        if energy.requires_grad:  # of a flat prior it does not
            (gradient,) = torch.autograd.grad(energy, theta, materialize_grads=True)
    return energy.detach().double(), gradient.double()


def _part(layout: Layout, point: Tensor, energy: Tensor, gradient: Tensor) -> dict[str, Any]:
    sizes = [site.size for site in layout]
    by_site = {}
    for name, of_site, piece in zip(layout.names, gradient.split(sizes), point.double().split(sizes), strict=True):
        along = of_site @ piece / piece.norm().clamp_min(1e-30)
        by_site[name] = [float(of_site.norm()), float(along)]
    return {"energy": float(energy), "length": float(point.double().norm()), "gradient": by_site}
