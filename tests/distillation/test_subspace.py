# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import gc
import re
import weakref

import pytest
import torch
from torch import nn

import pyro_apd as apd
from pyro_apd.distillation import subspace, subspace_settings
from pyro_apd.distillation.function_space import function_space
from pyro_apd.distillation.options import DistillOptions
from pyro_apd.distillation.probes import Probes
from pyro_apd.distillation.source import Source
from pyro_apd.distillation.subspace import fit_default
from pyro_apd.generators.draw_blocks import DrawBlocks
from pyro_apd.models.frozen import FrozenTensors
from pyro_apd.models.layout import Layout
from pyro_apd.posterior import integers

file_bytes = subspace.num_bytes

LAYOUT = Layout({"w": (20, 30), "b": (20,), "scale": ()})


def draws(num_chains=1, num_draws=60, layout=LAYOUT):
    generator = torch.Generator().manual_seed(0)
    theta_CSD = torch.randn(num_chains, num_draws, layout.size, generator=generator)
    theta_CSD[..., : 20 * 30 : 30] *= 0.01  # what data would determine: all units vary little in the first input
    return DrawBlocks(theta_CSD)


def fitted(blocks, layout=LAYOUT, **options):
    return fit_default(layout, blocks, None, DistillOptions(**options), 0).generator


def num_bytes(generator):
    return file_bytes(generator, LAYOUT)


@pytest.mark.parametrize("networks", [2.5, 4.0, 8.0])
def test_a_budget_in_networks_is_met(networks):
    size = num_bytes(fitted(draws(), byte_budget=networks))
    assert 0.8 * networks * 4 * LAYOUT.size < size <= networks * 4 * LAYOUT.size


def test_a_budget_in_bytes_is_met():
    assert 9_000 < num_bytes(fitted(draws(), byte_budget=10_000)) <= 10_000


def test_a_budget_that_is_too_small_is_refused_with_the_least():
    """Which is the same for all, and is accepted."""

    def least(budget):
        with pytest.raises(ValueError, match=r"byte_budget: [\d,]+ bytes are too few .* bytes.*2\.0 is two") as caught:
            fitted(draws(), byte_budget=budget)
        return int(re.search(r"the least is about ([\d,]+) bytes", str(caught.value))[1].replace(",", ""))

    found = least(1000)
    assert least(found // 2) == least(found - 1) == found
    assert num_bytes(fitted(draws(), byte_budget=found)) <= found


@pytest.mark.parametrize(("networks", "fewest", "most"), [(2.5, 2, 4), (4.0, 5, 16), (8.0, 20, 60)])
def test_a_small_budget_has_fewer_coordinates_rather_than_coarse_steps(networks, fewest, most):
    generator = fitted(draws(num_draws=200), byte_budget=networks)
    assert fewest <= generator.rank <= most
    assert generator.step.item() <= 2.5e-3 or generator.rank == 2
    assert fitted(draws(num_draws=200), byte_budget=networks, rank=12).rank == 12


def test_a_rank_that_was_asked_for_does_not_grow():
    assert fitted(draws(num_draws=200), byte_budget=4700, rank=1).rank == 1  # too few bytes for more than one mode


def test_a_fit_is_freed_before_the_next_one(monkeypatch):
    """Each takes the memory of many networks."""
    budget = 3 * num_bytes(fitted(draws()))
    fits = []

    class Noted(subspace_settings.SubspaceFit):
        def __init__(self, *args):
            gc.collect()
            assert [fit() for fit in fits] == [None] * len(fits)
            fits.append(weakref.ref(self))
            super().__init__(*args)

    monkeypatch.setattr(subspace_settings, "SubspaceFit", Noted)
    fitted(draws(), byte_budget=budget)
    assert len(fits) == 2


def test_a_fit_is_used_again_where_steps_alone_differ(monkeypatch):
    fits = []
    fit_with = subspace_settings.SubspaceFit
    monkeypatch.setattr(subspace_settings, "SubspaceFit", lambda *args: fits.append(1) or fit_with(*args))
    default_bytes = num_bytes(fitted(draws()))
    fits.clear()
    assert num_bytes(fitted(draws(), byte_budget=round(0.95 * default_bytes))) < default_bytes
    assert len(fits) == 1


def test_steps_are_not_searched_where_integers_allow_no_finer_ones(monkeypatch):
    sizes = []
    monkeypatch.setattr(subspace, "num_bytes", lambda generator, **_: sizes.append(num_bytes(generator)) or sizes[-1])
    theta_CSD = draws()[torch.arange(60)].unsqueeze(0)
    theta_CSD[..., 0] += 3.0  # a mean beside which steps cannot be fine
    generator = fitted(DrawBlocks(theta_CSD), byte_budget=100.0)
    assert sizes[-1] == sizes[-2] == num_bytes(generator)
    assert len(sizes) <= 5


def test_a_file_that_would_hold_too_many_integers_for_a_code_is_made_with_finer_steps(monkeypatch):
    """Coarse steps leave most integers zero. Written without a code these took more bytes than finer ones in it, and
    the search went the wrong way, to fewer coordinates.
    """
    monkeypatch.setattr(integers, "_ALWAYS", 0)
    monkeypatch.setattr(integers, "_PER_BYTE", 5)
    generator = fitted(draws(num_draws=200), byte_budget=8.0, rank=96)
    assert generator.rank == 96
    assert num_bytes(generator) <= 8.0 * 4 * LAYOUT.size


def test_more_bytes_give_finer_steps():
    coarse, fine = (fitted(draws(), byte_budget=networks, rank=6).step.item() for networks in (3.0, 8.0))
    assert fine < 0.5 * coarse


@pytest.mark.parametrize("direction", [{7: 1.0}, {7: 0.6, 30: -0.8}], ids=["column", "mixture"])
@pytest.mark.parametrize("deviation", [0.2, 0.01])
def test_what_all_units_leave_alone_is_pinned_where_inputs_are_not_known(direction, deviation):
    """One column that is far narrower than the others has a scale, and need not be pinned."""
    layout = Layout({"w": (20, 150)})
    theta_CSD = torch.randn(1, 100, layout.size, generator=torch.Generator().manual_seed(0))
    rows_SOI = theta_CSD.unflatten(-1, (20, 150))[0]
    vector_I = torch.zeros(150)
    vector_I[list(direction)] = torch.tensor(list(direction.values()))
    rows_SOI -= (1 - deviation) * (rows_SOI @ vector_I).unsqueeze(-1) * vector_I
    generator = fitted(DrawBlocks(theta_CSD), layout)
    part = generator.parts[0]
    assert not part.is_full
    assert part.has_scales == (len(direction) == 1 and deviation < 0.1)
    if not part.has_scales:
        frame_I = part.frame[0].float()
        assert float((frame_I @ vector_I).abs() / frame_I.norm()) > 0.9
    torch.manual_seed(0)
    found_SO = generator(generator.latents(500, generator.step)).detach().unflatten(-1, (20, 150)) @ vector_I
    assert float(found_SO.std(0).mean()) == pytest.approx(deviation, rel=0.1)


def test_short_chains_are_fitted_as_one():
    generator = fitted(draws(num_chains=6, num_draws=10))
    assert generator.num_chains == 1


def test_long_chains_have_modes_of_their_own():
    generator = fitted(draws(num_chains=3, num_draws=30))
    assert generator.num_chains == 3
    assert generator.rank <= 20


def test_rank_is_the_number_of_coordinates():
    assert fitted(draws(), rank=7).rank == 7


def test_a_posterior_of_few_numbers():
    layout = Layout({"mean": (), "scale": ()})
    generator = fitted(DrawBlocks(torch.randn(1, 50, 2)), layout)
    torch.manual_seed(0)
    assert generator(generator.latents(10, generator.step)).shape == (10, 2)


@pytest.mark.parametrize(("num_uses", "has_rows", "is_each"), [(1, True, False), (30, True, True), (30, False, False)])
def test_where_weights_are_used_often_for_a_row_each_draw_is_a_mode(num_uses, has_rows, is_each, monkeypatch):
    torch.manual_seed(0)
    model = apd.BNN(nn.Linear(8, 5), likelihood="categorical")
    layout = Layout({"net.weight": (5, 8), "net.bias": (5,)})
    theta_CSD = torch.linspace(-1, 1, 60).reshape(1, 60, 1) * torch.randn(layout.size) + 0.02 * torch.randn(
        1, 60, layout.size
    )
    functions = function_space(Source(theta_CSD, layout, model, (torch.randn(60, 8),)), None)
    monkeypatch.setattr(Probes, "has_rows", has_rows)
    found = fit_default(layout, DrawBlocks(theta_CSD), functions, DistillOptions(), num_uses * layout.size)
    assert (found.generator.num_modes == 60) == is_each


def test_frozen_weights_count_where_uses_of_a_weight_are_counted(monkeypatch):
    """A network with an adapter takes many multiplications per weight of the adapter, and few per weight."""
    torch.manual_seed(0)
    model = apd.BNN(nn.Linear(8, 5), likelihood="categorical")
    layout = Layout({"net.weight": (5, 8), "net.bias": (5,)})
    theta_CSD = torch.linspace(-1, 1, 60).reshape(1, 60, 1) * torch.randn(layout.size) + torch.randn(1, 60, layout.size)
    functions = function_space(Source(theta_CSD, layout, model, (torch.randn(60, 8),)), None)
    stiff = []
    monkeypatch.setattr(subspace, "_functions", lambda *args: stiff.append(1))
    frozen = FrozenTensors({"body.weight": "0" * 32}, values={"body.weight": torch.ones(3 * layout.size)})
    for known in (None, frozen):
        fit_default(layout, DrawBlocks(theta_CSD), functions, DistillOptions(), 30 * layout.size, known)
    assert len(stiff) == 1


@pytest.mark.parametrize(
    ("size", "times", "is_each"), [(40, 3.0, True), (40, 1.5, False), (40, None, False), (12, 3.0, False)]
)
def test_each_draw_is_a_mode_where_modes_are_few_of_the_bytes(size, times, is_each):
    """Coordinates of 60 draws take 240 bytes; of networks of 1,600 and 144 weights, which have 6,400 and 576 bytes.

    With coarse steps, means of draws are better.
    """
    layout = Layout({"w": (size, size)})
    noise_1SD = 0.05 * torch.randn(1, 60, layout.size, generator=torch.Generator().manual_seed(0))
    theta_CSD = torch.linspace(-1, 1, 60).reshape(1, 60, 1) + noise_1SD  # correlated over many draws
    default = fitted(DrawBlocks(theta_CSD), layout, rank=2)
    budget = None if times is None else round(times * file_bytes(default, layout))
    assert (fitted(DrawBlocks(theta_CSD), layout, rank=2, byte_budget=budget).num_modes == 60) == is_each
