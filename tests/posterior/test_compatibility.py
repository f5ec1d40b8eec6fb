# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_apd.errors import ArtifactError
from pyro_apd.generators import PaperGenerator
from pyro_apd.models.layout import Layout
from pyro_apd.posterior.posterior import DistilledPosterior
from tests.support.models import Classifier, Conjugate

X = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))


def posterior_of(sizes):
    wide, hidden, classes = sizes
    shapes = {
        "first.weight": (hidden, wide),
        "first.bias": (hidden,),
        "second.weight": (classes, hidden),
        "second.bias": (classes,),
    }
    layout = Layout(shapes)
    return DistilledPosterior(layout, PaperGenerator(layout.size, 3, 4))


def test_its_own_model_is_accepted_and_nothing_changes():
    posterior, model = posterior_of((4, 6, 3)), Classifier((4, 6, 3))
    before = torch.get_rng_state()
    posterior.check_model(model, X)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_model_is_named():
    posterior = posterior_of((4, 6, 3))
    with pytest.raises(ArtifactError, match=r"another model.*first\.weight"):
        posterior.check_model(Classifier((4, 7, 3)), X)
    with pytest.raises(ArtifactError, match=r"lacks \['first\.weight'"):
        posterior.check_model(Conjugate().full, Conjugate().x)
