# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import threading

import pytest
import torch
from pyro import poutine
from pyro.poutine.runtime import am_i_wrapped
from torch import nn

import pyro_apd as apd
from pyro_apd.errors import ModelError
from pyro_apd.generators import PaperGenerator
from pyro_apd.models.handlers import part_of_model
from pyro_apd.models.layout import Layout
from pyro_apd.runtime.threads import MODELS
from tests.support.threads import held_elsewhere, wait_until

KINDS = {
    "bnn": lambda: apd.BNN(nn.Linear(2, 3)),
    "guide": lambda: apd.DistilledPosterior(Layout({"w": (2,)}), PaperGenerator(2, 2, 4)),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_model_in_handlers_beside_another_thread_is_refused(name):
    model = KINDS[name]()

    def run():
        with poutine.trace():
            return model(torch.zeros(4, 2))

    with held_elsewhere():
        with pytest.raises(ModelError, match="'MainThread' runs a model while thread 'holder' does"):
            run()
        assert not am_i_wrapped()
    run()


def test_code_of_a_model_without_handlers_waits():
    bnn, results = apd.BNN(nn.Linear(2, 3)), []
    waiting = threading.Thread(target=lambda: results.append(bnn(torch.zeros(4, 2))))
    with held_elsewhere():
        waiting.start()
        wait_until(lambda: MODELS.is_wanted)
        assert not results
    waiting.join(30)
    assert results[0].shape == (4, 3)
    with part_of_model(), part_of_model():
        pass
