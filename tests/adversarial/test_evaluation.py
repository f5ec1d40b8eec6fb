# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Accuracy under attack, and detection."""

import json
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_apd import BNN, metrics, uncertainty
from pyro_apd.adversarial import Attack, attack, evaluate
from pyro_apd.predictive.predictive import outputs

pytest.importorskip("foolbox")

LINEAR = BNN(nn.Linear(2, 2))
WEIGHT = torch.tensor([[2.0, 1.0], [-2.0, -1.0]])
X = 2 * torch.rand(60, 2, generator=torch.Generator().manual_seed(0)) - 1
Y = (X @ WEIGHT[0] < 0).long()
SMALL = Attack("fgsm", epsilon=0.1, through="one")


def stack(*weights):
    return {"net.weight": torch.stack(weights), "net.bias": torch.zeros(len(weights), 2)}


def spread(count=20):
    return stack(*(WEIGHT + torch.randn(count, 2, 2, generator=torch.Generator().manual_seed(1))))


def test_of_one_network_everything_is_known():
    found = evaluate(LINEAR, stack(5 * WEIGHT), X, Y, [SMALL], bounds=(-1, 1))
    row = found.rows[0]
    # Wrong where the margin in the max norm is below epsilon; the bounds take nothing away.
    margin_N = (X @ WEIGHT[0]).abs() / WEIGHT[0].abs().sum()
    is_inside = ((X.abs() <= 0.9) | (X.sign() == (X @ WEIGHT[0]).sign().unsqueeze(1))).all(1)
    assert is_inside[margin_N < 0.1].all()
    assert found.clean_accuracy == 1.0
    assert row.num_successes == int((margin_N < 0.1).sum()) > 0
    assert row.robust_accuracy == pytest.approx(1 - row.num_successes / 60)
    assert row.success_rate == pytest.approx(row.num_successes / 60)
    assert row.distance == pytest.approx(0.1)
    # One network has no opinion on how sure it is: every score ties.
    assert row.auroc["mutual_information"] == row.auroc_successes["model_variance"] == 0.5


def test_figures_are_those_of_the_parts():
    draws, y = spread(), Y.clone()
    y[:6] = 1 - y[:6]  # wrong from the start, which no attack is to be credited with
    how = Attack("pgd", epsilon=0.2, through="mean", num_draws=20, num_steps=5)
    row = evaluate(LINEAR, draws, X, y, {"strong": how}, bounds=(-1, 1), seed=3).rows[0]
    attacked = attack(LINEAR, draws, X, y, how, bounds=(-1, 1), seed=4)
    clean, after = (outputs(LINEAR, draws, x).probs_SNK for x in (X, attacked.x))
    right, still = (probs.mean(0).argmax(-1) == y for probs in (clean, after))
    assert (~right & ~still).any()
    assert row.name == "strong"
    assert row.robust_accuracy == pytest.approx(float(still.float().mean()))
    assert row.num_successes == int((right & ~still).sum()) > 0
    assert row.success_rate == pytest.approx(row.num_successes / int(right.sum()))
    for name in ("predictive_entropy", "mutual_information", "model_variance"):
        score = getattr(uncertainty, name)
        assert row.auroc[name] == metrics.auroc(score(clean), score(after))
        assert row.auroc_successes[name] == metrics.auroc(score(clean)[right], score(after)[right & ~still])


def test_confidence_counts_the_other_way():
    draws, how = spread(), Attack("fgsm", epsilon=0.2, through="mean")
    row = evaluate(LINEAR, draws, X, Y, [how], bounds=(-1, 1), scores=["max_probability", "predictive_entropy"]).rows[0]
    # Of two classes, either orders inputs as the other does.
    assert row.auroc["max_probability"] == pytest.approx(row.auroc["predictive_entropy"])


def test_transfer_attacks_the_source_and_judges_the_target():
    target, source = stack(5 * WEIGHT), stack(-5 * WEIGHT)
    own = evaluate(LINEAR, target, X, Y, [SMALL], bounds=(-1, 1))
    transfer = evaluate(LINEAR, target, X, Y, [SMALL], bounds=(-1, 1), source=source)
    assert own.rows[0].num_successes > 0
    assert transfer.rows[0].num_successes == 0  # what hurts the opposite helps
    assert math.isnan(transfer.rows[0].auroc_successes["predictive_entropy"])
    assert transfer.to_json()["rows"][0]["auroc_successes"]["predictive_entropy"] is None
    assert json.loads(json.dumps(transfer.to_json()))["is_transfer"] is True
    other = BNN(nn.Sequential(nn.Linear(2, 2)))
    renamed = {name.replace("net.", "net.0."): value for name, value in source.items()}
    again = evaluate(LINEAR, target, X, Y, [SMALL], bounds=(-1, 1), source=renamed, source_model=other)
    assert again.rows == transfer.rows or again.rows[0].robust_accuracy == transfer.rows[0].robust_accuracy


def test_a_table():
    attacks = [SMALL, Attack("pgd", epsilon=0.2, num_draws=3, num_steps=2)]
    lines = str(evaluate(LINEAR, spread(), X, Y, attacks, bounds=(-1, 1))).splitlines()
    assert lines[0].startswith("accuracy ")
    assert "on 60 inputs in (-1, 1), 20 draws" in lines[0]
    assert "AUROC MI, all / successes" in lines[1]
    assert lines[2].split("  ")[0] == "FGSM, one network"
    assert " 5.0%" in lines[2]
    assert lines[3].split("  ")[0] == "PGD, expectation"
    assert len(lines) == 4


def test_a_seed_determines_the_figures():
    attacks = [Attack("pgd", epsilon=0.2, num_draws=3, num_steps=2)]
    before = torch.get_rng_state()
    first, again = (evaluate(LINEAR, spread(), X, Y, attacks, bounds=(-1, 1), num_draws=10) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert first == again
    assert first.num_draws == 10
    assert_close(torch.tensor(first.rows[0].distance), torch.tensor(0.2), atol=0.02, rtol=0)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"`scores` must be a list of names from .* got \['bald'\]"):
        evaluate(LINEAR, spread(), X, Y, [SMALL], bounds=(-1, 1), scores=["bald"])
    with pytest.raises(ValueError, match="Two of `attacks` have the same name"):
        evaluate(LINEAR, spread(), X, Y, [SMALL, SMALL], bounds=(-1, 1))
    with pytest.raises(ValueError, match="outside `bounds`"):
        evaluate(LINEAR, spread(), X, Y, [SMALL], bounds=(0, 1))
    with pytest.raises(TypeError, match="`posterior` must be an MCMC"):
        evaluate(LINEAR, None, X, Y, [SMALL], bounds=(-1, 1))
