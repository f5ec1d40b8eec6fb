# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Attacks, on linear classifiers where the best attack can be written down."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from pyro_apd import BNN
from pyro_apd.adversarial import METHODS, THROUGH, Attack, attack
from pyro_apd.adversarial.attacks import _Victim
from pyro_apd.errors import ModelError
from pyro_apd.models.layout import Layout
from pyro_apd.models.networks import Ensemble
from tests.support.models import Classifier

pytest.importorskip("foolbox")

X = torch.tensor([[0.5, 0.2], [0.1, 0.3], [-0.4, 0.1], [-0.2, -0.6]])
Y = torch.tensor([0, 0, 1, 1])
LINEAR = BNN(nn.Linear(2, 2))
#: Class 0 where 2 a + b > 0.
WEIGHT = torch.tensor([[2.0, 1.0], [-2.0, -1.0]])


def stack(*weights):
    return {"net.weight": torch.stack(weights), "net.bias": torch.zeros(len(weights), 2)}


def made(method, epsilon=0.1, through="one", draws=None, bounds=(-1.0, 1.0), seed=0, **options):
    how = Attack(method, epsilon=epsilon, through=through, **options)
    return attack(LINEAR, stack(WEIGHT) if draws is None else draws, X, Y, how, bounds=bounds, seed=seed)


def away(y):
    """The direction that a linear classifier is most hurt by, given the class."""
    return torch.where(y.unsqueeze(1) == 0, -1.0, 1.0).expand(-1, 2)


@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize("method", ["fgsm", "pgd"])
def test_of_a_linear_classifier_the_best_step_is_a_corner(method, through):
    attacked = made(method, through=through, num_draws=1)
    assert_close(attacked.x, X + 0.1 * away(Y))
    assert_close(attacked.distance_N, torch.full((4,), 0.1))
    assert attacked.found_N.all()


def test_the_minimal_step_is_the_margin_over_the_norm_rounded_up():
    attacked = made("fgsm_minimal", epsilon=0.4, num_steps=40)
    margin_N = (X @ (WEIGHT[0] - WEIGHT[1])).abs() / (WEIGHT[0] - WEIGHT[1]).abs().sum()
    expected = (margin_N * 100).floor() / 100 + 0.01
    assert_close(attacked.distance_N, torch.where(margin_N < 0.4, expected, torch.zeros(4)), atol=1e-6, rtol=0)
    assert attacked.found_N.tolist() == (margin_N < 0.4).tolist()
    too_small = made("fgsm_minimal", epsilon=0.05, num_steps=5)
    assert not too_small.found_N.any()
    assert torch.equal(too_small.x, X)


def test_the_minimal_step_of_what_is_wrong_already_is_none():
    attacked = made("fgsm_minimal", draws=stack(-WEIGHT))
    assert attacked.found_N.all()
    assert torch.equal(attacked.x, X)


def test_the_attacked_function_is_the_log_of_the_averaged_prediction():
    weights = torch.randn(5, 2, 2, generator=torch.Generator().manual_seed(0))
    draws = stack(*weights)
    victim = _Victim(LINEAR, draws, X[:1], Attack(epsilon=0.1, through="mean", num_draws=5))
    ensemble = Ensemble(LINEAR, Layout({"net.weight": (2, 2), "net.bias": (2,)}), draws)
    x = X.clone().requires_grad_()
    assert_close(victim(x).exp(), ensemble(x))
    (ours,) = torch.autograd.grad(victim(x)[:, 0].sum(), x)
    (theirs,) = torch.autograd.grad(ensemble(x).log()[:, 0].sum(), x)
    assert_close(ours, theirs)


def test_a_prediction_that_rounds_to_one_still_has_a_direction():
    draws = stack(30 * WEIGHT, 30 * WEIGHT)
    assert (60 * X @ WEIGHT[0]).abs().min() > 17  # beyond float32 from one
    attacked = made("fgsm", draws=draws, through="mean", num_draws=2)
    assert_close(attacked.x, X + 0.1 * away(Y))


def test_one_network_is_drawn_once_and_expectation_draws_at_each_step():
    class Counting:
        calls: list = []  # noqa: RUF012

        def get_samples(self, count):
            self.calls.append(count)
            return {name: value.expand(count, *value.shape[1:]) for name, value in stack(WEIGHT).items()}

    for through, expected in (("one", [1]), ("mean", [7]), ("expectation", [7] * 5)):
        Counting.calls.clear()
        made("pgd", through=through, draws=Counting(), num_draws=7, num_steps=3)
        # One draw to look at the model; of a fresh kind, one a step, and one for foolbox's own look at its success.
        assert Counting.calls == expected


def test_the_mean_of_two_networks_is_attacked_where_one_is_not():
    # One network reads the first pixel, the other the second: who knows one of them leaves the other pixel alone.
    a = torch.tensor([[4.0, 0.0], [-4.0, 0.0]])
    b = torch.tensor([[0.0, 4.0], [0.0, -4.0]])
    x, y = torch.full((1, 2), 0.3), torch.zeros(1, dtype=torch.long)
    moved = {}
    for through in THROUGH:
        how = Attack("pgd", epsilon=0.2, through=through, num_draws=2, random_start=False)
        moved[through] = attack(LINEAR, stack(a, b), x, y, how, bounds=(-1, 1)).x - x
    assert sorted(moved["one"].abs().flatten().tolist()) == pytest.approx([0.0, 0.2])
    for through in ("mean", "expectation"):
        assert_close(moved[through], torch.full((1, 2), -0.2))


@settings(deadline=None, max_examples=15)
@given(
    method=st.sampled_from(METHODS),
    through=st.sampled_from(THROUGH),
    epsilon=st.floats(1e-3, 1.0),
    seed=st.integers(0, 2**16),
)
def test_no_change_is_larger_than_allowed_nor_leaves_the_bounds(method, through, epsilon, seed):
    weights = 3 * torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(seed))
    attacked = made(method, epsilon, through, stack(*weights), (-0.7, 0.6), seed, num_draws=3, num_steps=4)
    assert attacked.distance_N.max() <= epsilon + 1e-6
    assert attacked.x.min() >= -0.7
    assert attacked.x.max() <= 0.6
    assert torch.equal(attacked.distance_N, (attacked.x - X).abs().amax(1))


def test_a_seed_determines_the_attack_and_leaves_global_state_alone():
    draws = stack(*torch.randn(30, 2, 2, generator=torch.Generator().manual_seed(0)))
    near = {"num_steps": 1, "step_size": 0.01}
    before = torch.get_rng_state()
    first, again, other = (made("pgd", 0.3, "one", draws, seed=seed, **near).x for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_batches_of_inputs_and_models_that_are_no_bnn():
    model = Classifier()
    x, y = torch.rand(7, 4), torch.arange(7) % 3
    draws = {"first.weight": torch.randn(3, 6, 4), "first.bias": torch.zeros(3, 6),
             "second.weight": torch.randn(3, 3, 6), "second.bias": torch.zeros(3, 3)}  # fmt: skip
    how = Attack("fgsm", epsilon=0.1, through="mean", num_draws=3)
    whole = attack(model, draws, x, y, how, bounds=(0, 1)).x
    assert_close(attack(model, draws, x, y, how, bounds=(0, 1), batch_size=3).x, whole)


def test_two_classes_by_one_logit():
    model = BNN(nn.Linear(2, 1), likelihood="bernoulli")
    draws = {"net.weight": torch.tensor([[[-2.0, -1.0]]]), "net.bias": torch.zeros(1, 1)}
    attacked = attack(model, draws, X, Y, Attack("fgsm", epsilon=0.1, through="one"), bounds=(-1, 1))
    assert_close(attacked.x, X + 0.1 * away(Y))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "cw"}, "method='cw' must be one of 'fgsm', 'fgsm_minimal', 'pgd'"),
        ({"through": "all"}, "through='all' must be one of"),
        ({"epsilon": math.nan}, "epsilon=nan must be a positive finite number. It is in the units of the inputs"),
        ({"epsilon": 0}, "epsilon=0 must be a positive finite number"),
        ({"step_size": -1.0}, "step_size=-1.0 must be a positive finite number"),
        ({"num_draws": 0}, "num_draws=0 must be a positive integer"),
        ({"num_steps": True}, "num_steps=True must be a positive integer"),
    ],
)
def test_attacks_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Attack(**{"epsilon": 0.1, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bounds": (0, 1)}, r"values from -0.6 to 0.5, outside `bounds`=\(0, 1\)"),
        ({"bounds": (1, -1)}, r"`bounds` must be \(least, greatest\)"),
        ({"bounds": (-0.7, 0.7)}, r"`epsilon`=1.5 is larger than the whole range"),
        ({"y": Y[:3]}, r"`y` must .* one for each of 4 data, \(4,\); got shape \(3,\)"),
        ({"y": Y.float()}, r"as integers; got torch.float32"),
        ({"y": Y + 9}, r"`y` must be whole numbers from 0 to 1; got .* in row 0"),
        ({"y": Y - 1}, r"`y` must be whole numbers from 0 to "),
        ({"y": Y.numpy()}, r"`y` must .* got ndarray"),
        ({"y": Y.to_sparse()}, r"\(sparse\)"),
        ({"x": X.numpy()}, r"`x` must .* got ndarray"),
        ({"x": X * float("nan")}, r"`x` holds NaN or infinity in 4 of 4 rows"),
        ({"x": X[:, :0]}, r"`x` must .* got shape \(4, 0\)"),
        ({"bounds": (-1, float("inf"))}, r"`bounds` must be \(least, greatest\)"),
        ({"bounds": ("a", "b")}, r"`bounds` must be \(least, greatest\)"),
        ({"x": X.long()}, r"`x` must be a floating-point tensor .* got shape \(4, 2\) of torch.int64"),
    ],
)
def test_inputs_that_are_refused(change, message):
    given = {"x": X, "y": Y, "bounds": (-1, 1), **change}
    how = Attack(epsilon=1.5 if "range" in message else 0.1)
    with pytest.raises(ValueError, match=message):
        attack(LINEAR, stack(WEIGHT), given["x"], given["y"], how, bounds=given["bounds"])


def test_a_regression_is_refused():
    model = BNN(nn.Linear(2, 1), likelihood="gaussian", noise_scale=1.0)
    draws = {"net.weight": torch.zeros(2, 1, 2), "net.bias": torch.zeros(2, 1)}
    with pytest.raises(ModelError, match=r"need a classification; .* 'normal'"):
        attack(model, draws, X, Y, Attack(epsilon=0.1), bounds=(-1, 1))


def test_without_foolbox(monkeypatch):
    monkeypatch.setitem(sys.modules, "foolbox", None)
    with pytest.raises(ImportError, match=r"made by foolbox, .* pip install 'pyro-apd\[apps\]'"):
        made("fgsm")
