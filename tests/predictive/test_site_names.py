# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A latent without draws would be drawn from its prior, and the prediction looks like any other."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine.messenger import Messenger

from pyro_apd import Predictive, log_likelihood, outputs

X, S = torch.zeros(4, 3), 5
DRAWS = {"w.weight": torch.zeros(S, 3), "scale": torch.ones(S)}


def model(x, y=None):
    w = pyro.sample("w.weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    pyro.deterministic("mean", x @ w)
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(x @ w, scale), obs=y)


def renamed(**names):
    return {names.get(name.replace(".", "_"), name): value for name, value in DRAWS.items()}


CALLS = {
    "Predictive": lambda draws: Predictive(model, draws)(X),
    "one site": lambda draws: Predictive(model, draws, return_sites=("obs",))(X),
    "reduced": lambda draws: Predictive(model, draws, reduce=("mean",))(X),
    "as pyro's": lambda draws: Predictive(model, draws, parallel=True)(X),
    "outputs": lambda draws: outputs(model, draws, X),
    "outputs of a site": lambda draws: outputs(model, draws, X, site="obs"),
    "log_likelihood": lambda draws: log_likelihood(model, draws, X, torch.zeros(4)),
}
# What the latent is called in the draws, and which latent is named in the error.
MISNAMED = {
    "misspelt": (renamed(w_weight="w.weigth"), "'w.weight' (nearest: 'w.weigth')"),
    "another case": (renamed(scale="Scale"), "'scale' (nearest: 'Scale')"),
    "without the module": (renamed(w_weight="weight"), "'w.weight' (nearest: 'weight')"),
    "of another model": ({"a": torch.zeros(S, 3), "b": torch.ones(S)}, "'w.weight' (nearest: "),
    "by its shape": (renamed(w_weight="beta"), "'w.weight' (nearest: 'beta')"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("what", MISNAMED)
def test_a_latent_by_another_name_is_refused(call, what):
    draws, named = MISNAMED[what]
    with pytest.raises(ValueError, match="which would be drawn from the prior") as caught:
        CALLS[call](draws)
    assert named in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_guide_of_another_name_is_refused():
    def guide(x):
        pyro.sample("w.weigth", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("scale", dist.LogNormal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"`guide` has no draws of .*'w.weight'.*'w.weigth'"):
        Predictive(model, guide=guide, num_samples=3)(X)


@pytest.mark.parametrize("call", CALLS)
def test_draws_of_another_shape_are_refused(call):
    with pytest.raises(ValueError, match=r"\['w.weight'\]` has draws of shape \(2,\).*values of shape \(3,\)"):
        CALLS[call]({**DRAWS, "w.weight": torch.zeros(S, 2)})
    with pytest.raises(ValueError, match=r"lack the first dimension"):
        CALLS[call]({"w.weight": torch.zeros(S), "scale": torch.ones(S)})


@pytest.mark.parametrize("call", CALLS)
def test_draws_grouped_by_chain_are_refused(call):
    """As many draws per chain as data would be taken for a value of each datum."""
    for site, whole in DRAWS.items():
        grouped = {**DRAWS, site: whole[:, None].expand(S, 4, *whole.shape[1:])}
        with pytest.raises(ValueError, match=rf"'{site}'.*\(C, S, \.\.\.\).*without group_by_chain.*flatten\(0, 1\)"):
            CALLS[call](grouped)


@pytest.mark.parametrize("call", [call for call in CALLS if call != "as pyro's"])  # the model has no batched latents
def test_what_is_right_is_not_refused(call):
    def tensors(draws):
        torch.manual_seed(0)
        found = CALLS[call](draws)
        if isinstance(found, torch.Tensor):
            return {"": found}
        values = found if isinstance(found, dict) else vars(found)
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    usual = tensors(DRAWS)
    assert usual
    # Draws of what the model does not have make no difference, where no latent lacks its own.
    more = tensors({**DRAWS, "mean": torch.zeros(S, 4), "another": torch.zeros(S, 7)})
    assert usual.keys() & more.keys()  # Predictive leaves out what the draws have
    for name in usual.keys() & more.keys():
        torch.testing.assert_close(more[name], usual[name])
    # Pyro's vectorised draws have dimensions of size 1 for plates.
    wide = tensors({**DRAWS, "scale": torch.ones(S, 1)})
    assert {name: value.shape for name, value in wide.items()} == {name: value.shape for name, value in usual.items()}


def test_latents_may_be_left_to_the_prior():
    """As in Pyro, for those that belong to the data."""
    assert Predictive(model, {"scale": DRAWS["scale"]})(X)["obs"].shape == (S, 4)
    assert Predictive(model, {"scale": DRAWS["scale"], "z": torch.zeros(S, 9)})(X)["obs"].shape == (S, 4)
    assert Predictive(model, num_samples=S)(X)["obs"].shape == (S, 4)


def test_other_handlers_see_the_model_once():
    """The check of names is not seen by the handlers around, nor by the random numbers."""

    class Counting(Messenger):
        seen: int = 0

        def _pyro_sample(self, msg):
            self.seen += 1

    found = {}
    for cls in (pyro.infer.Predictive, Predictive):
        torch.manual_seed(0)
        with Counting() as counting:
            found[cls] = (cls(model, DRAWS)(X)["obs"].tolist(), counting.seen)
    assert found[Predictive] == found[pyro.infer.Predictive]


def test_draws_of_several_dtypes_are_named():
    def linear(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(torch.addmv(b.expand(len(x)), x, w), 1.0))

    with pytest.raises(ValueError, match=r"draws of these dtypes: .*'b': 'torch.int64'"):
        outputs(linear, {"w": torch.zeros(S, 3), "b": torch.zeros(S, 1, dtype=torch.long)}, X)
