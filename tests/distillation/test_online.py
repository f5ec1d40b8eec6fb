# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Chains and generator together: the same whatever happens in between, in memory that does not grow."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.utils.data import DataLoader, TensorDataset

from pyro_apd import SGLD, DistillationError, DistillationWarning, DivergenceError, distill_online
from pyro_apd.chains.checkpoint import CheckpointError
from pyro_apd.chains.driver import MCMC
from pyro_apd.distillation import online, training
from pyro_apd.distillation.budget import TrainingBudget
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.runtime.file_lock import locked
from pyro_apd.runtime.seeds import derived_seed
from tests.distillation.test_offline import Largest
from tests.support.models import Conjugate

pytestmark = pytest.mark.slow

MODEL = Conjugate(num_data=40)
X, Y = MODEL.x, MODEL.y


@pytest.fixture(autouse=True)
def _few_probes(monkeypatch):
    """What is tested here does not hang on how finely generators are compared, and that is most of the time."""
    monkeypatch.setattr(
        TrainingBudget, "of", classmethod(lambda cls, *args: cls(num_probes=8, num_evaluation_draws=40))
    )


def noisier(x, y=None):
    with poutine.scale(scale=0.5):
        return MODEL.full(x, y)


def kernel(model=MODEL.full, step_size=5e-3, **options):
    return SGLD(model, step_size, **{"thinning": 2, "seed": 4, **options})


def run(*args, sampler=None, **options):
    options = {
        "num_samples": 40, "warmup_steps": 10, "num_chains": 2, "buffer_size": 40, "rounds": 2, "num_steps": 8,
        "seed": 0, "progress": False, **options,
    }  # fmt: skip
    return distill_online(kernel() if sampler is None else sampler, *(args or (X, Y)), **options)


def contents(posterior, path):
    posterior.save(path)
    return path.read_bytes()


def stopping(at, error=KeyboardInterrupt):
    """An ``on_round`` that interrupts when so many draws are made."""

    def on_round(posterior, num_draws):
        if num_draws == at:
            raise error

    return on_round


def interrupt_draw(monkeypatch, at, error=KeyboardInterrupt):
    """Interrupts the chains when they have made so many draws, warm-up included."""
    drew = online._OnlineRun.drew

    def stopped(self, group, num_done, num_diverged):
        if num_done == at:
            raise error
        drew(self, group, num_done, num_diverged)

    monkeypatch.setattr(online._OnlineRun, "drew", stopped)


def test_it_is_the_conjugate_posterior(monkeypatch):
    """Mean within 0.3 posterior sd, sd within 15 per cent, correlations within 0.15: of 100 draws of eight chains,
    every second, of which SGLD's own step size makes 2 per cent too wide."""
    monkeypatch.undo()  # but here it does
    model = Conjugate(num_data=100)
    step_size = 0.1 / model.largest_curvature
    posterior = run(
        model.x, model.y, sampler=kernel(model.full, step_size, thinning=20), num_samples=100, warmup_steps=5,
        num_chains=8, buffer_size=400, num_steps=20, rounds=1,
    )  # fmt: skip
    drawn = posterior.get_samples(4000, seed=1)["w"]
    sd = model.covariance.diagonal().sqrt()
    assert ((drawn.mean(0) - model.mean).abs() < 0.3 * sd).all()
    assert (drawn.std(0) / sd - 1).abs().max() < 0.15
    assert (torch.corrcoef(drawn.mT) - model.covariance / torch.outer(sd, sd)).abs().max() < 0.15


def test_rounds_are_logged_and_told_of():
    told = []
    posterior = run(rounds=3, on_round=lambda p, n: told.append((p, n)))
    assert [n for _, n in told] == [10, 20, 40]
    assert all(isinstance(p, DistilledPosterior) for p, _ in told)
    assert all(p.frozen.read == {} for p, _ in told)
    assert told[-1][0] is posterior
    metadata = posterior.metadata
    assert (metadata["online"], metadata["draws_seen"], metadata["seed"]) == (True, 40, 0)
    assert [entry["draws"] for entry in metadata["rounds"]] == [10, 20, 40]
    assert metadata["rounds"][-1] == {"draws": 40, **metadata["metrics"]}
    assert [len(p.metadata["rounds"]) for p, _ in told] == [1, 2, 3]
    # A quarter of the steps, but for the last; 40 draws per chain, of which every second is kept, in the end.
    assert [p.metadata["num_steps"] for p, _ in told] == [2, 2, 8]
    assert [p.metadata["num_draws"] for p, _ in told] == [10, 20, 20]


def test_rounds_without_draws_enough_are_left_out():
    told = []
    run(num_chains=1, num_samples=20, rounds=4, on_round=lambda p, n: told.append(n))
    assert told == [10, 20]


def test_the_same_seeds_give_the_same_file(tmp_path):
    first = contents(run(), tmp_path / "first")
    torch.rand(3)
    assert contents(run(), tmp_path / "second") == first
    assert contents(run(seed=1), tmp_path / "other") != first
    assert contents(run(sampler=kernel(seed=5)), tmp_path / "other") != first


def test_state_is_as_it_was():
    before = torch.get_rng_state()
    run()
    assert torch.equal(torch.get_rng_state(), before)
    assert pyro.distributions.is_validation_enabled()


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("at", [5, 29, 47])
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(tmp_path, monkeypatch, at, restart):
    """Stopped in warm-up, just before the first round, and after it."""
    warnings.simplefilter("ignore", DistillationWarning)
    whole = contents(run(restart=restart), tmp_path / "whole")
    options = {"checkpoint": tmp_path / "run.ckpt", "checkpoint_every": 7, "restart": restart}
    with monkeypatch.context() as patch:
        interrupt_draw(patch, at, ZeroDivisionError)
        with pytest.raises(ZeroDivisionError):
            run(**options)
    assert contents(run(**options), tmp_path / "resumed") == whole
    # And one that is complete gives the same again, without a step.
    monkeypatch.setattr(online._OnlineRun, "drew", None)
    assert contents(run(**options), tmp_path / "again") == whole


def test_without_seeds_a_resumed_run_has_those_that_it_began_with(tmp_path, monkeypatch):
    options = {"checkpoint": tmp_path / "run.ckpt", "seed": None}
    pyro.set_rng_seed(11)
    whole = run(sampler=kernel(seed=None), seed=None)
    pyro.set_rng_seed(11)
    with monkeypatch.context() as patch:
        interrupt_draw(patch, 35, ZeroDivisionError)
        with pytest.raises(ZeroDivisionError):
            run(sampler=kernel(seed=None), **options)
    resumed = run(sampler=kernel(seed=None), **options)
    assert resumed.metadata["seed"] == whole.metadata["seed"]
    assert torch.equal(resumed.get_samples(3, seed=0)["w"], whole.get_samples(3, seed=0)["w"])


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"buffer_size": 44}, "online was"),
        ({"rounds": 3}, "online was"),
        ({"restart": True}, "restart was null, now"),
        ({"num_samples": 41}, "num_samples was 40, now 41"),
        ({"sampler": kernel(step_size=1e-3)}, "kernel.schedule was"),
        ({"sampler": kernel(seed=9)}, "seed was 4, now 9"),
        ({"sampler": kernel(model=noisier)}, "the likelihood is another"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_checkpoint_of_another_run_is_refused(finished, other, what):
    warnings.simplefilter("ignore", DistillationWarning)
    with pytest.raises(CheckpointError, match=f"belongs to another run: .*{what}"):
        run(checkpoint=finished, **other)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("online") / "run.ckpt"
    run(checkpoint=path)
    return path


def test_drivers_and_online_runs_refuse_each_others_checkpoints(tmp_path, finished):
    mcmc = MCMC(kernel(), 40, 10, num_chains=2, checkpoint=finished, disable_progbar=True)
    with pytest.raises(CheckpointError, match="online was"):
        mcmc.run(X, Y)
    mcmc = MCMC(kernel(), 40, 10, num_chains=2, checkpoint=tmp_path / "run.ckpt", disable_progbar=True)
    mcmc.run(X, Y)
    with pytest.raises(CheckpointError, match="online was null"):
        run(checkpoint=tmp_path / "run.ckpt")


def test_two_runs_do_not_write_the_same_checkpoint(tmp_path):
    path = tmp_path / "run.ckpt"
    with (
        locked(path, RuntimeError),
        pytest.raises(CheckpointError, match=r"checkpoint='.*run.ckpt' is in use by another run: this process"),
    ):
        run(checkpoint=path)
    with pytest.raises(ValueError, match="checkpoint='' must be a path"):
        run(checkpoint="")


def test_ctrl_c_after_a_round_gives_what_it_made():
    with pytest.warns(DistillationWarning, match="interrupted after 20 of 40 draws per chain, .* of the first 20"):
        posterior = run(on_round=stopping(20))
    assert (posterior.metadata["draws_seen"], posterior.metadata["num_steps"]) == (20, 2)


@pytest.mark.parametrize("at", [20, 40])
def test_an_error_of_on_round_has_the_posterior(at):
    with pytest.raises(RuntimeError, match="mine") as found:
        run(on_round=stopping(at, RuntimeError("mine")))
    assert found.value.posterior.metadata["draws_seen"] == at
    assert found.value.posterior.get_samples(3, seed=0)
    assert f"after {at} draws per chain" in found.value.__notes__[0]


def test_ctrl_c_between_rounds_gives_the_last(monkeypatch):
    interrupt_draw(monkeypatch, 45)
    with pytest.warns(DistillationWarning, match="interrupted after 34 of 40 draws per chain, .* of the first 20"):
        assert run().metadata["draws_seen"] == 20


def test_ctrl_c_before_the_first_round_gives_the_start(monkeypatch):
    interrupt_draw(monkeypatch, 26)
    with pytest.warns(DistillationWarning, match="interrupted after 15 of 40 draws per chain, .* of the first 15"):
        posterior = run()
    assert (posterior.metadata["draws_seen"], posterior.metadata["num_steps"]) == (15, 0)
    assert torch.isfinite(posterior.get_samples(5)["w"]).all()


@pytest.mark.parametrize("at", [1, 12])
@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_ctrl_c_before_there_are_draws_is_raised_on(monkeypatch, tmp_path, at, has_checkpoint):
    interrupt_draw(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(checkpoint=tmp_path / "run.ckpt" if has_checkpoint else None)
    notes = getattr(caught.value, "__notes__", [])
    assert len(notes) == (has_checkpoint and at == 12)  # the first is written after two draws
    assert all(f"checkpoint '{tmp_path / 'run.ckpt'}'" in note and "distill_online()" in note for note in notes)


def interrupt_training(monkeypatch, at):
    """Ctrl-C in a step of training, of all rounds together."""
    calls, steps = [], training._steps

    def stopping(*args):
        for loss in steps(*args):
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt
            yield loss

    monkeypatch.setattr(training, "_steps", stopping)


def test_ctrl_c_while_a_round_trains_ends_the_run(monkeypatch):
    interrupt_training(monkeypatch, at=2)
    with pytest.warns(DistillationWarning, match="interrupted after 20 of 40 draws per chain, .* of the first 20"):
        assert run().metadata["draws_seen"] == 20


def test_ctrl_c_while_the_last_round_trains_gives_the_best_so_far(monkeypatch):
    interrupt_training(monkeypatch, at=7)
    with pytest.warns(DistillationWarning, match="training was interrupted at step 4 of 8"):
        assert run().metadata["draws_seen"] == 40


def test_ctrl_c_while_the_last_round_begins_gives_the_one_before(monkeypatch):
    make = online.distill_draws

    def stopped(source, wishes, *args):
        if wishes.share_of_steps == 1:
            raise KeyboardInterrupt
        return make(source, wishes, *args)

    monkeypatch.setattr(online, "distill_draws", stopped)
    with pytest.warns(DistillationWarning, match="interrupted after 40 of 40 draws per chain, .* of the first 20"):
        assert run().metadata["draws_seen"] == 20


def test_strict_raises_instead():
    with pytest.raises(DistillationError, match="interrupted after 20 of 40"):
        run(on_round=stopping(20), strict=True)


def collapse(monkeypatch, is_every):
    """Generators without spread: all, or only those of rounds before the last."""
    make = online.distill_draws

    def narrow(source, wishes, *args):
        posterior, trained = make(source, wishes, *args)
        if is_every or wishes.num_steps != 8:
            trained.metrics["spread_ratio"] = 0.01
        return posterior, trained

    monkeypatch.setattr(online, "distill_draws", narrow)


def test_a_collapsed_generator_is_never_returned_silently(monkeypatch):
    collapse(monkeypatch, is_every=True)
    with pytest.warns(DistillationWarning, match="collapsed") as caught:
        run()
    assert len(caught) == 1  # rounds on the way are not returned
    assert caught[0].filename == __file__
    with pytest.raises(DistillationError, match="collapsed"):
        run(strict=True)
    with pytest.warns(DistillationWarning, match="interrupted after 20 .*collapsed"):
        run(on_round=stopping(20))


def test_a_round_on_the_way_may_fail_even_where_it_is_strict(monkeypatch):
    collapse(monkeypatch, is_every=False)
    assert run(strict=True).metadata["draws_seen"] == 40


@pytest.mark.parametrize("num_chains", [1, 3])
def test_restarting_puts_chains_at_draws_of_the_generator_and_warns(monkeypatch, num_chains):
    states = {}
    drew = online._OnlineRun.drew

    def noting(self, group, num_done, num_diverged):
        before = self._chain.theta.clone()
        drew(self, group, num_done, num_diverged)
        if not torch.equal(before, self._chain.theta):
            states[num_done] = self._chain.theta.clone()

    monkeypatch.setattr(online._OnlineRun, "drew", noting)
    rounds = {}
    with pytest.warns(DistillationWarning, match="restart=True: chains continue from draws of the generator"):
        run(restart=True, rounds=3, num_chains=num_chains, on_round=lambda p, n: rounds.setdefault(n, p))
    assert list(states) == [20, 30]  # after 10 and 20 draws, but not after the last
    expected = rounds[10].get_samples(num_chains, seed=derived_seed(4, "restart", 10))["w"]
    assert torch.equal(states[20].reshape(num_chains, 3), expected)


def quartic(y):
    """Chains from far away run away at a step size that is fine for those from near."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    pyro.sample("obs", dist.Normal(w.square().sum(), 1.0), obs=y)


def test_a_chain_that_diverged_is_left_out():
    start = {"w": torch.tensor([[0.5, 0.5], [60.0, 60.0], [-0.5, 0.5]])}
    sampler = SGLD(quartic, 1e-2, thinning=5, seed=1)
    options = {"num_chains": 3, "warmup_steps": 0, "initial_params": start, "buffer_size": 60}
    with pytest.warns(RuntimeWarning, match=r"Chains \[1\] of 3 diverged and stopped"):
        posterior = run(torch.tensor(1.0), sampler=sampler, **options)
    assert (posterior.metadata["num_chains"], posterior.metadata["num_draws"]) == (2, 20)
    assert posterior.get_samples(200, seed=0)["w"].abs().max() < 5


def test_all_chains_diverged_and_what_they_drew_is_not_lost():
    def exploding(step):
        return 5e-3 if step < 70 else 10.0

    with pytest.raises(DivergenceError, match=r"try step_size=") as caught:
        run(sampler=kernel(step_size=exploding))
    draws = caught.value.draws["w"]
    assert draws.shape[1:] == (3,)
    assert len(draws) >= 10
    assert (draws - MODEL.mean).abs().max() < 2


def test_no_round_is_made_of_draws_that_ran_away_unnoticed(monkeypatch):
    """Chains are looked at now and then only, and a round may come before."""
    write, told = online.EvenStore.write, []

    def broken(self, chain, draw, theta_CD, statistics):
        write(self, chain, draw, theta_CD * torch.nan if draw < 20 else theta_CD, statistics)

    monkeypatch.setattr(online.EvenStore, "write", broken)
    monkeypatch.setattr(online._Rounds, "make", lambda self, store, num_draws, is_last=False: told.append(num_draws))
    with pytest.raises(TypeError):  # for want of a posterior
        run()
    assert told == [40]


def test_a_loader():
    loader = DataLoader(TensorDataset(X, Y), batch_size=10, shuffle=True)
    posterior = run(loader, sampler=kernel(MODEL.stating_size, step_size=1e-3))
    assert posterior.metadata["space"] == "functions"
    assert "data" not in posterior.metadata  # the first batch is not all of them


def test_initial_params_of_one_chain_and_of_several():
    for num_chains, start in ((1, MODEL.mean), (2, MODEL.mean.expand(2, 3))):
        posterior = run(num_chains=num_chains, initial_params={"w": start}, warmup_steps=0, num_steps=0)
        assert posterior.metadata["num_chains"] == num_chains
    with pytest.raises(ValueError, match=r"initial_params has 'w' of shape \(3,\); with num_chains=2"):
        run(initial_params={"w": MODEL.mean})


def test_probe_inputs_are_tried_before_the_first_step(monkeypatch):
    interrupt_draw(monkeypatch, 1, AssertionError)
    with pytest.raises(ValueError, match="cannot be run on `probe_inputs`"):
        run(probe_inputs=(torch.randn(7, 5), torch.randn(7)))


def test_keyword_arguments_of_the_model():
    posterior = run(X, model_kwargs={"y": Y})
    assert posterior.metadata["space"] == "functions"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 9}, "num_samples=9 must be an integer >= 10"),
        ({"num_samples": 40.0}, "num_samples=40.0 must be an integer"),
        ({"num_samples": "40", "warmup_steps": None}, "num_samples=.40. must be an integer"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be an integer >= 0"),
        ({"num_chains": 0}, "num_chains=0 must be a positive integer"),
        ({"num_chains": True}, "num_chains=True must be a positive integer"),
        ({"num_chains": "2"}, "num_chains='2' must be a positive integer"),
        ({"buffer_size": 19}, "buffer_size=19 must be an integer >= 20"),
        ({"num_chains": 30}, "buffer_size=40 must be an integer >= 60"),
        ({"rounds": 0}, "rounds=0 must be a positive integer"),
        ({"checkpoint_every": 5}, "checkpoint_every=5 needs checkpoint="),
        ({"checkpoint_every": 0, "checkpoint": "run.ckpt"}, "checkpoint_every=0 must be a positive integer"),
        ({"num_steps": -1}, "num_steps=-1 must be an integer >= 0"),
        ({"rank": 0}, "rank=0"),
        ({"seed": -1}, "seed=-1"),
        ({"storage_dtype": "int4"}, "`storage_dtype` must be one of"),
    ],
    ids=str,
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


@pytest.mark.parametrize("other", [pyro.infer.NUTS(MODEL.full), SGLD, None], ids=["NUTS", "class", "None"])
def test_kernels_of_others(other):
    with pytest.raises(TypeError, match=r"`kernel` must be a kernel of this package.* by OnlineDistillation"):
        distill_online(other, X, Y)


def bounded(x):
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(50)).to_event(1))
    mix = pyro.sample("mix", dist.Dirichlet(torch.ones(50)))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal((mix * scale).sum(), 1.0), obs=x)


@pytest.mark.parametrize("most", [120, pytest.param(400, marks=pytest.mark.thorough)])
def test_memory_does_not_depend_on_the_length_of_the_run(most):
    largest = []
    for num_samples in (60, most):
        with warnings.catch_warnings(), Largest(X) as seen:
            warnings.simplefilter("ignore")  # chains as short as these have not warmed up
            posterior = run(
                torch.randn(20), sampler=kernel(bounded, 1e-3, thinning=1), num_samples=num_samples, num_steps=0,
                rank=8, rounds=1, buffer_size=32, warmup_steps=2,
            )  # fmt: skip
        largest.append(seen.num_bytes)
    drawn = posterior.get_samples(20)
    assert (drawn["scale"] > 0).all()
    torch.testing.assert_close(drawn["mix"].sum(-1), torch.ones(20))
    assert largest[1] <= largest[0]  # a longer run is thinned to as many draws, or fewer
    if most == 400:
        assert largest[1] < 2 * most * 99 * 4  # what the draws of the longer run would take
