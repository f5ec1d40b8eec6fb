# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Entries of one group, see :mod:`tests.refusals`."""

from pyro_apd.chains.checkpoint import CheckpointError
from tests.refusals.refusal import Refusal

REFUSALS: list[Refusal] = [
    Refusal(
        title="A checkpoint of another prior",
        example="""
for scale in (1.0, 0.5):
    sample(apd.BNN(nn.Linear(3, 3), prior_scale=scale), x, labels, checkpoint="run.ckpt")
""",
        error=CheckpointError,
        mentions=("run.ckpt' belongs to another run", 'the prior of sites ["net.weight"', "another checkpoint="),
        why="Draws of two posteriors would be one chain. Models are compared by prior and likelihood at a fixed point.",
    ),
    Refusal(
        title="A checkpoint of another network",
        example="""
for activation in (nn.ReLU(), nn.Tanh()):
    net = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 3))
    sample(apd.BNN(net), x, labels, checkpoint="run.ckpt")
""",
        error=CheckpointError,
        mentions=("run.ckpt' belongs to another run", "the likelihood is another", "another checkpoint="),
        why="Other frozen weights, or another constant from outside the model, are another likelihood, too.",
    ),
    Refusal(
        title="A checkpoint of other data",
        example="""
model = apd.BNN(nn.Linear(3, 3))
sample(model, x, labels, checkpoint="run.ckpt")
sample(model, x, (labels + 1) % 3, checkpoint="run.ckpt")
""",
        error=CheckpointError,
        mentions=("run.ckpt' belongs to another run", "argument #1 of the model was given other data"),
        why="All contents of tensors and arrays in memory are compared.",
    ),
    Refusal(
        title="A checkpoint of another schedule",
        example="""
for size in (1e-5, 2e-5):
    kernel = apd.SGLD(apd.BNN(nn.Linear(3, 3)), lambda step: size / (1 + step), seed=0)
    apd.MCMC(kernel, 4, 2, checkpoint="run.ckpt", disable_progbar=True).run(x, labels)
""",
        error=CheckpointError,
        mentions=("belongs to another run", "the step size at step 0 was 1e-05, now 2e-05"),
        why="Schedules are compared by the step sizes at 64 steps of the run.",
    ),
    Refusal(
        title="The checkpoint before one that was removed",
        example="""
from pathlib import Path

sample(apd.BNN(nn.Linear(3, 3)), x, labels, checkpoint="run.ckpt")
Path("run.ckpt").unlink()
sample(apd.BNN(nn.Linear(3, 3)), x, labels, checkpoint="run.ckpt")
""",
        error=CheckpointError,
        mentions=("no checkpoint", "run.ckpt.previous'", "rename it to 'run.ckpt'", "move it away, too"),
        why="Who removes a checkpoint wants the run to start over; who lost it wants to resume.",
    ),
    Refusal(
        title="A folder as a checkpoint",
        example="""
sample(apd.BNN(nn.Linear(3, 3)), x, labels, checkpoint=".")
""",
        error=CheckpointError,
        mentions=("is a folder, and must be a file", "run.ckpt'"),
        why="A checkpoint is one file. What is there is left as it is.",
        instead="""
sample(apd.BNN(nn.Linear(3, 3)), x, labels, checkpoint="run.ckpt")
""",
    ),
    Refusal(
        title="A file that is no checkpoint",
        example="""
from pathlib import Path

Path("table.csv").write_text("x,y")
sample(apd.BNN(nn.Linear(3, 3)), x, labels, checkpoint="table.csv")
""",
        error=CheckpointError,
        mentions=("table.csv is not a safetensors file", "Nothing was changed", "another checkpoint="),
        why="The file would be replaced.",
    ),
    Refusal(
        title="Draws of another run at store_path",
        example="""
for _ in range(2):
    sample(apd.BNN(nn.Linear(3, 3)), x, labels, store="disk", store_path="draws")
""",
        error=FileExistsError,
        mentions=("store_path=", "draws of an earlier run, [4] by chain", "Give another path", "checkpoint="),
        why="The first run's draws would be lost. `run()` of the same `MCMC` again replaces its own.",
    ),
    Refusal(
        title="Two runs on one checkpoint",
        example="""
from pathlib import Path
from pyro_apd.runtime.file_lock import locked

with locked(Path("run.ckpt").absolute(), ValueError):  # as another run does
    sample(apd.BNN(nn.Linear(3, 3)), x, labels, checkpoint="run.ckpt")
""",
        error=CheckpointError,
        mentions=("run.ckpt' is in use by another run: this process", "give another path"),
        why="Each would replace the draws of the other. A lock ends with the process that holds it.",
    ),
]
