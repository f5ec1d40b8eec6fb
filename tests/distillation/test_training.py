# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The loop: keeps the best, ends in order, and tells when a generator is no good."""

import math

import pytest
import torch

from pyro_apd.distillation.evaluators import Evaluator
from pyro_apd.distillation.objective import Objective
from pyro_apd.distillation.training import Schedule, train
from pyro_apd.generators import PaperGenerator


class Shift(Objective):
    """Drives the mean of the draws towards a target; may fail at a step."""

    def __init__(self, target=2.0, fail_at=None, failure=None):
        self.target, self.fail_at, self.failure, self.step = target, fail_at, failure, 0

    def backward(self, generate):
        self.step += 1
        if self.step == self.fail_at and isinstance(self.failure, BaseException):
            raise self.failure
        is_bad = self.step == self.fail_at
        loss = generate(4).mean() * self.failure if is_bad else (generate(16).mean() - self.target) ** 2
        loss.backward()
        return loss.detach()


class Mean(Evaluator):
    """Distance of the mean from a value of its own."""

    def __init__(self, best):
        self.best, self.seen = best, []

    def metrics(self, theta):
        mean = float(torch.cat(list(theta)).mean())
        self.seen.append(abs(mean - self.best))
        return {"distance": self.seen[-1], "spread_ratio": 1.0 if math.isfinite(mean) else math.nan}


def run(objective, evaluator, num_steps=60, is_annealed=False):
    generator = PaperGenerator(3, latent_size=2, width=4)
    schedule = Schedule(num_steps, 2e-2, is_annealed)
    return generator, train(generator, objective, evaluator, schedule, progress=False)


def test_the_best_state_is_kept_and_not_the_last():
    evaluator = Mean(best=1.0)
    generator, training = run(Shift(target=5.0), evaluator, num_steps=200)
    assert 0 < training.best_step < 200
    assert training.metrics["distance"] == min(evaluator.seen) < evaluator.seen[-1]
    with torch.no_grad():
        assert abs(float(generator(torch.randn(500, 2)).mean()) - 1.0) < abs(evaluator.seen[-1])
    assert training.stopped is None


class Told(Evaluator):
    """Gives distances that were made up beforehand, and notes what it evaluated."""

    def __init__(self, distances, tolerance):
        self.distances, self.tolerance, self.evaluated = list(distances), tolerance, []

    def metrics(self, theta):
        self.evaluated.append(torch.cat(list(theta)))
        return {"distance": self.distances[len(self.evaluated) - 1], "spread_ratio": 1.0}


@pytest.mark.parametrize(
    ("distances", "tolerance", "best"),
    [
        ([1.0, 0.5, 0.505, 0.6], 0.01, 2),  # a later one within the tolerance wins
        ([1.0, 0.5, 0.52, 0.6], 0.01, 1),  # a worse one does not
        ([1.0, 0.5, 0.508, 0.516], 0.01, 2),  # nor does it creep: the smallest is what counts
        ([1.0, 0.5, 0.49, 0.495], 0.01, 3),
        ([1.0, 0.5, 0.505, 0.5], 0.0, 1),  # without one, only a smaller one wins
        ([0.2, 0.5, 0.6, 0.7], 0.01, 0),
    ],
)
def test_a_later_state_wins_within_the_tolerance(distances, tolerance, best):
    states, evaluator = [], Told(distances, tolerance)
    generator = PaperGenerator(3, latent_size=2, width=4)
    metrics = evaluator.metrics

    def noting(theta):
        states.append({name: value.clone() for name, value in generator.state_dict().items()})
        return metrics(theta)

    evaluator.metrics = noting
    training = train(generator, Shift(), evaluator, Schedule(3, 2e-2, False), progress=False)
    assert training.best_step == best
    assert training.metrics["distance"] == distances[best]
    assert all(torch.equal(value, states[best][name]) for name, value in generator.state_dict().items())
    assert not torch.equal(states[0]["layers.0.weight"], states[1]["layers.0.weight"])


def test_every_state_is_evaluated_by_the_same_latents():
    """Else a state would win by luck of its draws. Where nothing is trained, all that is evaluated is the same."""
    evaluator = Told([1.0] * 9, 0.0)
    generator = PaperGenerator(3, latent_size=2, width=4)
    train(generator, Shift(), evaluator, Schedule(4, 0.0, False), progress=False)
    assert len(evaluator.evaluated) == 5
    assert all(torch.equal(theta_SD, evaluator.evaluated[0]) for theta_SD in evaluator.evaluated)
    assert evaluator.evaluated[0].shape == (200, 3)


def test_no_graph_of_a_draw_is_kept(monkeypatch):
    """It would hold all that the draw was decoded from."""
    generator, given = PaperGenerator(3, latent_size=2, width=4), []
    latents = generator.latents
    monkeypatch.setattr(generator, "latents", lambda count, like: given.append(like) or latents(count, like))
    train(generator, Shift(), Mean(2.0), Schedule(0, 1e-2), progress=False)
    assert given
    assert all(like.grad_fn is None for like in given)


def test_evaluation_leaves_the_random_numbers_of_training_alone():
    states = []
    for num_evaluations in (1, 20):
        torch.manual_seed(3)
        generator = PaperGenerator(3, latent_size=2, width=4)
        schedule = Schedule(20, 1e-2, False, num_evaluations=num_evaluations)
        train(generator, Shift(), Told(range(30, 0, -1), 0.0), schedule, progress=False)
        states.append(generator.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_log_has_one_entry_for_each_evaluation():
    _, training = run(Shift(), Mean(2.0))
    assert training.log["step"] == [float(3 * i) for i in range(21)]
    assert {len(values) for values in training.log.values()} == {21}
    assert math.isnan(training.log["loss"][0])


def test_no_steps_give_the_start():
    generator = PaperGenerator(3, latent_size=2, width=4)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    training = train(generator, Shift(), Mean(2.0), Schedule(0, 1e-2), progress=False)
    assert training.best_step == 0
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())


@pytest.mark.parametrize(("accepted", "num_steps"), [(None, 8), (1e-9, 8), (1e9, 0)])
def test_steps_are_taken_only_where_the_start_is_not_near_enough(accepted, num_steps):
    objective = Shift()
    schedule = Schedule(8, 2e-2, is_annealed=False, accepted_distance=accepted)
    generator = PaperGenerator(3, latent_size=2, width=4)
    training = train(generator, objective, Mean(best=5.0), schedule, progress=False)
    assert (objective.step, training.num_steps) == (num_steps, num_steps)


def test_interruption_gives_the_best_so_far():
    _, training = run(Shift(fail_at=40, failure=KeyboardInterrupt()), Mean(2.0))
    assert training.stopped == "training was interrupted at step 39 of 60"
    assert training.is_interrupted
    assert 0 < training.best_step <= 39


def test_divergence_gives_the_best_before():
    generator, training = run(Shift(fail_at=31, failure=math.nan), Mean(2.0))
    assert "diverged" in training.stopped
    assert not training.is_interrupted
    assert 0 < training.best_step <= 30
    assert all(torch.isfinite(value).all() for value in generator.state_dict().values())


def test_other_errors_are_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        run(Shift(fail_at=5, failure=ZeroDivisionError()), Mean(2.0))


def test_parameters_without_gradient_stay():
    generator = PaperGenerator(3, latent_size=2, width=4)
    first = generator.layers[0].weight.requires_grad_(False)
    before = first.clone()
    train(generator, Shift(), Mean(2.0), Schedule(20, 1e-2), progress=False)
    assert torch.equal(generator.layers[0].weight, before)


def test_progress_bar_shows_metrics(capsys):
    generator = PaperGenerator(3, latent_size=2, width=4)
    train(generator, Shift(), Mean(2.0), Schedule(20, 1e-2), progress=True)
    assert "distance" in capsys.readouterr().err


def test_rates_fall_with_the_root_of_what_moves_together():
    trained = [torch.nn.Parameter(torch.zeros(size)) for size in (40_000, 10)]
    assert Schedule(10, 3e-3, max_sum_change=0.3).rates(trained) == [pytest.approx(0.3 / 200), 3e-3]
    assert Schedule(10, 3e-3).rates(trained) == [3e-3, 3e-3]
