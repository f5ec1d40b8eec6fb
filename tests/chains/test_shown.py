# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC

from pyro_apd.chains.driver import MCMC
from pyro_apd.chains.shown import site_table
from tests.chains.walk import Walk


def run(**settings):
    mcmc = MCMC(Walk(**settings), 8, 3, num_chains=2, disable_progbar=True)
    mcmc.run(torch.ones(4, 2))
    return mcmc


def test_a_run_says_what_it_will_do_and_what_it_did():
    mcmc = MCMC(Walk(), 8, 3, num_chains=2, disable_progbar=True)
    first, *_, last = repr(mcmc).splitlines()
    assert first == "MCMC: 2 x 8 draws after 3 of warm-up"
    assert last == "  not run yet"
    assert "8 draws of 8 numbers per chain" in repr(run())


def test_missing_chains_are_named():
    with pytest.warns(RuntimeWarning, match="diverged"):
        mcmc = run(diverges_after={1: 6})
    assert "per chain, without chains [1]" in repr(mcmc)


def test_a_kernel_of_others_is_shown_by_name():
    mcmc = MCMC(HMC(lambda: pyro.sample("z", dist.Normal(0, 1)), step_size=0.5), 20, 10, disable_progbar=True)
    assert repr(mcmc).splitlines()[1:] == ["  HMC", "  not run yet"]
    mcmc.run()
    assert "not run" not in repr(mcmc)


def test_few_numbers_have_pyros_table(capsys):
    run().summary(prob=0.8)
    assert "10.0%" in capsys.readouterr().out


def test_many_numbers_have_a_row_per_site(capsys, monkeypatch):
    monkeypatch.setattr("pyro_apd.chains.shown.MOST_ROWS", 2)
    run().summary()
    text = capsys.readouterr().out
    assert text.startswith("MCMC: 2 x 8 draws")
    assert [line.split()[0] for line in text.splitlines()[-3:]] == ["b", "scale", "w"]
    with pytest.raises(ValueError, match="no draws yet"):
        MCMC(Walk(), 8, 3).summary()


def test_rows_summarise_the_numbers_of_a_site():
    generator = torch.Generator().manual_seed(0)
    independent_CSOI = 2.0 + 0.5 * torch.randn(4, 500, 10, 30, generator=generator)
    apart_CS1 = torch.randn(4, 500, 1, generator=generator) + 5 * torch.arange(4).view(4, 1, 1)
    header, *rows = site_table({"w": independent_CSOI, "apart": apart_CS1, "none": torch.ones(4, 500, 0)}).splitlines()
    assert header.split()[:4] == ["site", "shape", "mean", "sd"]
    name, shape, mean, sd, least, median, r_hat, largest = rows[0].split()
    assert (name, shape) == ("w", "10x30")
    assert float(mean) == pytest.approx(2, abs=0.01)
    assert float(sd) == pytest.approx(0.5, abs=0.01)
    assert 1000 < float(least) < float(median) < 3000
    assert float(r_hat) == pytest.approx(1, abs=0.01)
    assert float(largest) < 1.02
    assert float(rows[1].split()[-1]) > 3
    assert rows[2].split()[2:] == ["nan"] * 6


def test_sizes_that_cannot_be_known_are_not_numbers():
    alternating_CS1 = torch.tensor([1.0, -1.0]).repeat(50).reshape(1, 100, 1)  # Pyro's size is negative
    text = site_table({"few": torch.ones(2, 3, 4), "alternating": alternating_CS1})
    few, alternating = (line.split()[2:] for line in text.splitlines()[1:])
    assert few == ["1", "0", "nan", "nan", "nan", "nan"]
    assert alternating[2:4] == ["nan", "nan"]
