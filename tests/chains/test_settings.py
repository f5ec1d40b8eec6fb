# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Settings of a run, made of the driver's arguments; most errors are tested in ``test_driver.py``."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pyro.infer import NUTS

from pyro_apd.chains import MCMC
from pyro_apd.chains.settings import checked_checkpoint, checked_initial_params, checked_store, checkpoint_interval
from pyro_apd.kernels import SGLD
from tests.chains.walk import Walk
from tests.support.models import Classifier


def test_integers_of_numpy_count():
    mcmc = MCMC(Walk(), np.int64(5), np.int32(2), num_chains=np.int64(3), disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples(group_by_chain=True)["w"].shape == (3, 5, 3)
    assert type(mcmc.num_samples) is int


@pytest.mark.parametrize("settings", [{"num_samples": True}, {"num_samples": 0}, {"num_samples": 2.0}])
def test_other_numbers_of_draws(settings):
    with pytest.raises(ValueError, match=r"num_samples=.* must be a positive integer"):
        MCMC(Walk(), **settings)


def test_twenty_checkpoints_by_default():
    path = Path("run.ckpt")
    assert checkpoint_interval(None, None, 1000) is None
    assert checkpoint_interval(path, None, 1000) == 50
    assert checkpoint_interval(path, None, 7) == 1
    assert checkpoint_interval(path, 3, 1000) == 3


def test_files_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checked_checkpoint("run.ckpt", None) == tmp_path / "run.ckpt"
    assert checked_store("disk", None, tmp_path / "run.ckpt") == tmp_path / "run.ckpt.draws"
    assert checked_store("disk", "draws", None) == tmp_path / "draws"
    assert checked_store("memory", None, tmp_path / "run.ckpt") is None


@pytest.mark.parametrize("path", ["", "a\0b", b"run.ckpt", 3, True])
def test_what_is_no_path(path):
    with pytest.raises(ValueError, match=r"checkpoint=.* must be a path, such as checkpoint='run.ckpt'"):
        checked_checkpoint(path, None)
    with pytest.raises(ValueError, match=r"store_path=.* must be a path, such as store_path='draws'"):
        checked_store("disk", path, None)


def test_starts_have_a_leading_dimension_of_chains():
    assert checked_initial_params(None, 3) is None
    assert checked_initial_params({"w": torch.zeros(2)}, 1)["w"].shape == (1, 2)
    assert checked_initial_params({"w": torch.zeros(3, 2)}, 3)["w"].shape == (3, 2)
    with pytest.raises(ValueError, match=r"'w' of shape \(2,\); with num_chains=3"):
        checked_initial_params({"w": torch.zeros(2)}, 3)
    assert checked_initial_params({"w": np.zeros((3, 2))}, 3)["w"].shape == (3, 2)
    with pytest.raises(ValueError, match="initial_params is a list; give a dict"):
        checked_initial_params([torch.zeros(2)], 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_params": "w"}, r"save_params must be a list .*\['w'\]; got 'w'"),
        ({"save_params": 5}, "save_params must be a list .*got 5"),
        ({"hook_fn": "print"}, "hook_fn must be a function.*params, stage, i.*got str"),
        ({"kernel": Classifier}, "kernel must be .*SGLD.*the class Classifier"),
        ({"kernel": Classifier()}, "kernel must be .*SGLD.*got Classifier"),
    ],
)
def test_arguments_of_other_kinds(settings, message):
    with pytest.raises(ValueError, match=message):
        MCMC(**{"kernel": NUTS(Classifier()), "num_samples": 2, **settings})


@pytest.mark.parametrize("kernel", [NUTS(Classifier()), SGLD(Classifier(), 1e-3)])
def test_results_before_a_run(kernel):
    mcmc = MCMC(kernel, 2)
    for result in (mcmc.get_samples, lambda: mcmc.get_samples(group_by_chain=True), mcmc.diagnostics, mcmc.summary):
        with pytest.raises(ValueError, match=r"no draws yet: call mcmc.run\("):
            result()
