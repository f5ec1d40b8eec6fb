# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Whatever evaluates draws with a model refuses one with other frozen weights than the one that was sampled."""

import pytest
import torch
from torch import nn

from pyro_apd import diagnostics, ood
from pyro_apd.adversarial import Attack, attack, evaluate
from pyro_apd.baselines import dark_knowledge
from pyro_apd.chains.stores.base import MemoryStore
from pyro_apd.errors import ArtifactError
from pyro_apd.generators import LowRankGenerator
from pyro_apd.models.bnn import BNN
from pyro_apd.models.frozen import FrozenTensors
from pyro_apd.models.layout import Layout
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.predictive.model_check import check_frozen

X = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3
HOW = Attack("fgsm", epsilon=0.1)
LAYOUT = Layout({"net.1.weight": (3, 2), "net.1.bias": (3,)})


def bayesian(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    net[0].requires_grad_(False)
    return BNN(net)


OWN, OTHER = bayesian(1), bayesian(2)
FROZEN = FrozenTensors.of(OWN, LAYOUT.names, (X, Y))


def chain(info=None):
    store = MemoryStore(LAYOUT, 1, 10, torch.zeros(1, LAYOUT.size))
    for draw in range(10):
        statistics = dict.fromkeys(("potential", "grad_norm", "step_size"), 0.0)
        store.write(0, draw, torch.randn(1, LAYOUT.size), statistics)
    store.info = {"frozen": FROZEN.to_json()} if info is None else info
    return store


def generator():
    made = LowRankGenerator(LAYOUT.size, 2)
    torch.nn.init.normal_(made.location)
    return DistilledPosterior(LAYOUT, made, frozen=FROZEN)


USES = {
    "attack": lambda model, source: attack(model, source, X, Y, HOW, bounds=(0, 1)),
    "evaluate": lambda model, source: evaluate(
        model, source, X, Y, [HOW], bounds=(0, 1), source={**source.get_samples(2)}
    ),
    "ood": lambda model, source: ood.evaluate(model, source, X, X + 1, num_samples=5),
    "student": lambda model, source: dark_knowledge(source, model, nn.Linear(3, 3), X, num_steps=1, progress=False),
    "compare": lambda model, source: diagnostics.compare(source, source.get_samples(8), model, X, num_samples=8),
    "to_arviz": lambda model, source: diagnostics.to_arviz(None, source, model, X, Y, num_samples=2),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("make", [chain, generator])
def test_a_model_with_another_backbone_is_refused(use, make):
    source = make()
    USES[use](OWN, source)
    with pytest.raises(ArtifactError, match=r"other frozen weights.*'net\.0\."):
        USES[use](OTHER, source)


def test_both_sides_of_a_comparison_are_compared_with_the_model():
    with pytest.raises(ArtifactError, match="other frozen weights"):
        diagnostics.compare(chain().get_samples(), generator(), OTHER, X, num_samples=8)


def test_what_notes_nothing_is_accepted_and_errors_of_the_model_are_left_to_others():
    draws = chain().get_samples()

    def is_refused(source, x):
        try:
            check_frozen(source, OTHER, draws, (x,), {})
        except ArtifactError:
            return True
        return False

    assert is_refused(chain(), X)
    assert is_refused(generator(), X)
    assert not is_refused(draws, X)
    assert not is_refused(chain({}), X)
    assert not is_refused(generator(), X[:, :2])  # the model fails on these inputs, and says so itself


@pytest.mark.parametrize("copied", [lambda store: MemoryStore.of(store, "cpu"), MemoryStore.adopting])
def test_a_copy_of_a_store_knows_the_frozen_weights(copied):
    assert copied(chain()).frozen == FrozenTensors(FROZEN.read, FROZEN.unread)
