# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import warnings

import numpy as np
import pytest
import torch

from pyro_apd.diagnostics import convergence
from pyro_apd.diagnostics.arviz_export import compat
from pyro_apd.diagnostics.mixing.convergence import STATISTICS, statistics
from tests.support.small_posteriors import autoregressive


def by_arviz(values_CS):
    """The same figures by ArviZ."""
    arviz = compat.import_arviz()
    values = values_CS.double().numpy()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return [
            float(arviz.rhat(values)) if len(values) > 1 else float("nan"),
            float(arviz.ess(values, method="bulk")),
            float(arviz.ess(values, method="tail")),
            float(arviz.mcse(values, method="mean")),
            float(arviz.mcse(values, method="sd")),
        ]


def assert_agree(values_CSD, rtol=1e-6):
    found = statistics(values_CSD)
    for i in range(values_CSD.shape[2]):
        ours = [float(found[name][i]) for name in STATISTICS]
        np.testing.assert_allclose(ours, by_arviz(values_CSD[:, :, i]), rtol=rtol)


@pytest.mark.parametrize(("chains", "draws"), [(4, 100), (4, 101), (3, 57), (1, 80), (2, 8), (2, 5), (2, 4), (1, 4)])
@pytest.mark.parametrize("a", [-0.6, 0.0, 0.9])
def test_figures_are_those_of_arviz(chains, draws, a):
    g = torch.Generator().manual_seed(chains * draws)
    assert_agree(autoregressive(chains, draws, (4,), a, g))


@pytest.mark.parametrize("draws", [10, 14])
def test_short_series_whose_correlations_never_die_out(draws):
    # Geyer's sequence then ends at the end of the chain, at times with a negative lag in a positive pair.
    g = torch.Generator().manual_seed(draws)
    assert_agree(torch.randn(1, draws, 12, generator=g).cumsum(1))


def test_chains_apart_heavy_tails_and_other_spreads():
    g = torch.Generator().manual_seed(0)
    apart = torch.randn(4, 60, 2, generator=g) + torch.arange(4.0)[:, None, None]
    tails = torch.randn(4, 60, 1, generator=g) / torch.randn(4, 60, 1, generator=g)
    wide = torch.randn(4, 60, 1, generator=g) * torch.tensor([1.0, 1.0, 1.0, 5.0])[:, None, None]
    assert_agree(torch.cat([apart, tails, wide], 2))
    # A spread that differs shows in the folded ranks alone.
    assert float(statistics(wide)["rhat"]) > 1.2


def test_ties_share_their_rank():
    g = torch.Generator().manual_seed(0)
    counts = torch.randint(4, (3, 50, 3), generator=g).float()
    held = torch.randn(3, 10, 2, generator=g).repeat_interleave(5, 1)
    assert_agree(torch.cat([counts, held], 2))


def test_what_has_no_figure():
    g = torch.Generator().manual_seed(0)
    values = torch.randn(2, 40, 3, generator=g)
    values[0, 3, 1] = float("nan")
    values[:, :, 2] = 7.0
    found = statistics(values)
    alone = statistics(values[:, :, :1])
    for name in STATISTICS:
        # Transforms of several series together may differ in the last bit from that of one.
        torch.testing.assert_close(found[name][:1], alone[name], rtol=1e-12, atol=0)
        assert found[name][1].isnan()
    assert found["ess_bulk"][2] == 80  # as ArviZ has it of what never moves
    assert found["rhat"][2].isnan()
    assert all(value.isnan().all() for value in statistics(values[:, :3]).values())
    assert statistics(values[:1])["rhat"].isnan().all()
    assert statistics(values[:, :, :0])["rhat"].shape == (0,)


def test_chunks_make_no_difference():
    values = torch.randn(2, 30, 11, generator=torch.Generator().manual_seed(0))
    whole, pieces = statistics(values), statistics(values, chunk_size=3)
    for name in STATISTICS:
        torch.testing.assert_close(whole[name], pieces[name], rtol=1e-12, atol=0)


def test_by_site(case):
    mcmc = case.StubMCMC(case.chain(2, 20), case.model)
    found = convergence(mcmc)
    assert list(found) == ["hidden.weight", "hidden.bias", "out.weight", "out.bias"]
    assert found["hidden.weight"]["rhat"].shape == (4, 2)
    one = by_arviz(mcmc.get_samples(group_by_chain=True)["hidden.weight"][:, :, 3, 1])
    np.testing.assert_allclose([float(found["hidden.weight"][name][3, 1]) for name in STATISTICS], one, rtol=1e-6)
    assert convergence({"scale": torch.rand(2, 20)})["scale"]["ess_bulk"].shape == ()
    assert convergence({"scale": torch.rand(20)}, group_by_chain=False)["scale"]["rhat"].isnan()


def test_errors_say_what_came():
    with pytest.raises(ValueError, match=r"chains, draws, quantities.*\(3, 4\)"):
        statistics(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"chunk_size.*got 0"):
        statistics(torch.zeros(2, 8, 1), chunk_size=0)
    with pytest.raises(TypeError, match="int"):
        convergence(3)
