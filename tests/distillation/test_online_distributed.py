# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Online distillation over processes: of the same chains, one generator, and nothing lost with a process."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import pyro_apd
from pyro_apd import SGLD, DivergenceError, distill_online
from pyro_apd.chains.checkpoint import CheckpointError, read_file
from pyro_apd.chains.distributed import path_of_rank
from pyro_apd.distillation import online, setup, training
from pyro_apd.distillation.budget import TrainingBudget
from pyro_apd.distillation.objective import AdversarialObjective
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.runtime.ranks import RankError, join_process_group
from tests.support.models import Conjugate
from tests.support.processes import on_ranks

pytestmark = pytest.mark.slow

MODEL = Conjugate(num_data=40)
X, Y = MODEL.x, MODEL.y


@pytest.fixture(autouse=True)
def _few_probes(monkeypatch):
    """As for one process."""
    few = TrainingBudget(num_probes=8, num_evaluation_draws=40)
    monkeypatch.setattr(TrainingBudget, "of", staticmethod(lambda num_weights, num_products=0: few))


def run(step_size=5e-3, **options):
    options = {
        "num_samples": 40, "warmup_steps": 10, "num_chains": 3, "buffer_size": 60, "rounds": 2, "num_steps": 8,
        "seed": 0, "progress": False, "chain_method": "distributed", **options,
    }  # fmt: skip
    return distill_online(SGLD(MODEL.full, step_size, thinning=2, seed=4, capture=False), X, Y, **options)


def contents(posterior, path):
    posterior.save(path)
    return path.read_bytes()


@pytest.mark.parametrize("step_size", [5e-3, "auto"])
def test_chains_and_buffer_do_not_depend_on_the_number_of_processes(step_size, tmp_path):
    """Without training, a posterior is a function of the buffer."""

    def on_rank(rank):
        return contents(run(step_size, num_steps=0), tmp_path / f"{rank}.safetensors")

    found = on_ranks(on_rank, 2, tmp_path)
    for method in ("distributed", "vectorized"):
        expected = contents(run(step_size, num_steps=0, chain_method=method), tmp_path / "one.safetensors")
        assert found == [expected, expected]


@pytest.mark.parametrize("is_blind", [False, True], ids=["functions", "weights"])
def test_all_get_one_trained_generator(is_blind, tmp_path, monkeypatch):
    if is_blind:  # then there is a critic
        monkeypatch.setattr(setup, "function_space", lambda source, probe_inputs: None)

    def on_rank(rank):
        seen = []
        posterior = run(on_round=lambda posterior, num_draws: seen.append(num_draws))
        return contents(posterior, tmp_path / f"{rank}.safetensors"), str(posterior.training_log), seen

    first, second = on_ranks(on_rank, 2, tmp_path)
    assert first[:2] == second[:2]
    assert (first[2], second[2]) == ([20, 40], [])
    posterior = DistilledPosterior.load(tmp_path / "0.safetensors")
    assert posterior.metadata["num_chains"] == 3
    assert (posterior.get_samples(300, seed=0)["w"].mean(0) - MODEL.mean).abs().max() < 0.3


class _Toy(nn.Module):
    output_size, latent_size = 1, 1

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))

    def latents(self, count, like=None):
        return torch.randn(count, 1)

    def forward(self, latents):
        return self.value + 0.0 * latents


def test_gradients_are_those_of_all_processes_together(tmp_path):
    """Each pulls another way; together they go to the middle."""

    class Pull:
        def __init__(self, target):
            self.target = target

        def backward(self, generate):
            loss = (generate(5) - self.target).square().mean()
            loss.backward()
            return loss.detach()

    class Evaluating:
        tolerance = 0.0

        def metrics(self, theta):
            return {"distance": -float(next(iter(theta)).mean())}  # the last is the best

    def on_rank(rank):
        ranks, toy = join_process_group(), _Toy()
        if ranks.rank:
            nn.init.constant_(toy.value, 77.0)  # the first one's parameters go for all
        schedule = training.Schedule(400, 0.05)
        with torch.random.fork_rng():
            training.train(toy, Pull(1.0 + 2.0 * rank), Evaluating(), schedule, progress=False, ranks=ranks)
        return toy.value.item()

    first, second = on_ranks(on_rank, 2, tmp_path)
    assert first == second
    assert first == pytest.approx(2.0, abs=0.05)


def test_critics_stay_one(tmp_path):
    def on_rank(rank):
        ranks = join_process_group()
        torch.manual_seed(rank)
        real = torch.randn(50, 3)
        critic = AdversarialObjective(lambda theta: theta, real, 1e-3, batch_size=10, ranks=ranks)
        for _ in range(3):
            critic.backward(lambda count: torch.randn(count, 3, requires_grad=True))
        return [parameter.detach().clone() for parameter in critic._critic.parameters()]

    first, second = on_ranks(on_rank, 2, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# -- what goes wrong --------------------------------------------------------------------------------------------------


def dying(monkeypatch, fuse, at):
    """Ends the second process at a draw, warm-up included, once."""
    drew = online._OnlineRun.drew

    def mortal(self, group, num_done, num_diverged):
        if self.ranks.rank == 1 and num_done == at and fuse.exists():
            fuse.unlink()
            os._exit(9)
        drew(self, group, num_done, num_diverged)

    monkeypatch.setattr(online._OnlineRun, "drew", mortal)


@pytest.mark.parametrize("at", [3, 30, 33])
def test_a_process_that_dies_is_noticed_and_the_run_resumes(at, tmp_path, monkeypatch):
    """Before the first checkpoint, in a round, and between."""
    fuse, path = tmp_path / "fuse", tmp_path / "run.ckpt"
    dying(monkeypatch, fuse, at)

    def on_rank(rank):
        return contents(run(checkpoint=path, checkpoint_every=6), tmp_path / f"{rank}.safetensors")

    fuse.touch()
    first, code = on_ranks(on_rank, 2, tmp_path)
    assert code == 9
    assert isinstance(first, RankError)
    assert "Rank 0 of 2: another process of the job has ended" in str(first)
    assert path_of_rank(path, 0).exists() == (at >= 6)
    resumed = on_ranks(on_rank, 2, tmp_path)
    expected = on_ranks(lambda rank: contents(run(), tmp_path / f"whole{rank}"), 2, tmp_path)
    assert resumed == expected


def test_a_checkpoint_that_one_process_alone_could_write_is_passed_over(tmp_path, monkeypatch):
    """Killed between the first's writing and the second's."""
    path, fuse = tmp_path / "run.ckpt", tmp_path / "fuse"
    save = online._OnlineRun._save

    def mortal(self, saved):
        if self.ranks.rank == 1 and self._notes["written"] == 3 and fuse.exists():
            fuse.unlink()
            os._exit(9)
        save(self, saved)

    monkeypatch.setattr(online._OnlineRun, "_save", mortal)

    def on_rank(rank):
        return contents(run(checkpoint=path, checkpoint_every=6), tmp_path / f"{rank}.safetensors")

    fuse.touch()
    assert on_ranks(on_rank, 2, tmp_path)[1] == 9
    written = [read_file(path_of_rank(path, rank)).notes["written"] for rank in (0, 1)]
    assert written == [3, 2]
    resumed = on_ranks(on_rank, 2, tmp_path)
    assert resumed == on_ranks(lambda rank: contents(run(), tmp_path / f"whole{rank}"), 2, tmp_path)
    for error in on_ranks(on_rank, 3, tmp_path):
        assert isinstance(error, CheckpointError)


def test_all_chains_diverged(tmp_path):
    def exploding(step):
        return 5e-3 if step < 70 else 10.0

    for error in on_ranks(lambda rank: run(step_size=exploding), 2, tmp_path):
        assert isinstance(error, DivergenceError)
        assert error.draws["w"].shape[1:] == (3,)


def test_settings():
    with pytest.raises(ValueError, match="chain_method='parallel' must be one of 'vectorized', 'distributed'"):
        run(chain_method="parallel")


SCRIPT = """
    import os, sys
    import torch.distributed
    from pyro_apd import SGLD, distill_online
    from tests.support.models import Conjugate

    torch.set_num_threads(1)
    folder, attempt, rank = sys.argv[1], os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    model = Conjugate(num_data=40)

    def die(posterior, num_draws):
        if attempt == "0" and num_draws == 20:
            os.kill(os.getpid(), 9)

    posterior = distill_online(
        SGLD(model.full, 5e-3, thinning=2, seed=4, capture=False), model.x, model.y, num_samples=40, warmup_steps=10,
        num_chains=2, buffer_size=40, rounds=2, num_steps=4, seed=0, progress=False, on_round=die,
        checkpoint=f"{folder}/run.ckpt", checkpoint_every=5, chain_method="distributed",
    )
    posterior.save(f"{folder}/{rank}.safetensors")
    open(f"{folder}/attempt{rank}", "w").write(attempt)
"""


@pytest.mark.thorough
def test_torchrun_restarts_a_job_that_lost_a_process(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(SCRIPT))
    root = Path(pyro_apd.__file__).parents[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1",
        "--monitor-interval=0.1", str(script), str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    job = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert job.returncode == 0, job.stderr
    assert [(tmp_path / f"attempt{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    first, second = ((tmp_path / f"{rank}.safetensors").read_bytes() for rank in (0, 1))
    assert first == second
    assert DistilledPosterior.load(tmp_path / "0.safetensors").metadata["draws_seen"] == 40
