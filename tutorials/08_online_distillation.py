# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 8. Online distillation without storing the chain
#
# The tutorials so far ran a chain to its end, stored every draw, and distilled. A long chain of a large network can be
# too large to store: ten thousand draws of half a million weights are 20 GB. `distill_online` advances chains and
# generator together and holds a fixed number of draws, whatever the length of the run (algorithm 2 of the paper). This
# tutorial shows what it holds, what it loses compared with the stored chain, how an interrupted run continues, and how
# to use it with other drivers.

# %%
import os
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.mcmc import NUTS, StreamingMCMC
from torch import nn

import pyro_apd as apd
from pyro_apd.diagnostics import plots

QUICK = os.environ.get("PYRO_APD_TUTORIAL_QUICK") == "1"  # a smoke test: everything runs, and little of it means much
torch.set_num_threads(1)  # for matrices this small, threads cost more than they give


def size(full, quick):
    return quick if QUICK else full


# %% [markdown]
# ## What is held
#
# It holds a buffer of draws. These are not the last draws, which would be a poor choice if the chain drifts, nor random
# ones, but evenly spaced ones. When the buffer is full, every second draw is removed, and from then on every second new
# draw is taken; and so on. The rule in a few lines, for a buffer of 16:


# %%
def held(num_draws, capacity):
    """Which of the draws so far are in the buffer."""
    stride, kept = 1, []
    for draw in range(num_draws):
        if draw % stride:
            continue
        if len(kept) == capacity:
            stride, kept = 2 * stride, kept[::2]
            if draw % stride:
                continue
        kept.append(draw)
    return kept


num_weights = 64 * 50 + 50 + 50 * 10 + 10
made = torch.arange(4, 4004, 40)
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
for count in range(1, 101):
    kept = held(count, 16)
    axes[0].plot([count] * len(kept), kept, ".", color="#0072B2", markersize=3)
axes[0].set(title="a buffer of 16 draws", xlabel="draws made", ylabel="which of them are held")
stored = made * 4 * num_weights * 4 / 1e6
buffered = torch.tensor([4 * len(held(int(n), 128)) * num_weights * 4 / 1e6 for n in made])
axes[1].plot(made, stored, "-", color="#767676", label="all draws")
axes[1].plot(made, buffered, "--", color="#D55E00", label="a buffer of 512 (128 a chain)")
axes[1].set(title="four chains of a 64-50-10 network", xlabel="draws made by each chain", ylabel="MB held")
_ = axes[1].legend()

# %% [markdown]
# Left: each column is one moment. The draws held always range from the first to the last, and are evenly spaced. Right:
# the same in bytes. The buffer is between half full and full, while the stored chain grows without limit.
#
# ## Running it
#
# The call takes a kernel and the model's arguments. There is no driver, because no chain is returned. The generator is
# fitted to the buffer in rounds: when a quarter and a half of the draws are made, and at the end. `on_round` receives
# each round's posterior. Here it prints metrics on test data, and after the second round it simulates Ctrl-C.

# %%
data = apd.datasets.digits(seed=0)
model = apd.BNN(nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10)), "categorical", prior_scale=0.4)
lengths = {"num_samples": size(300, 40), "warmup_steps": size(150, 10), "num_chains": 4}
settings = {"buffer_size": size(256, 32), "seed": 0, "progress": False}
checkpoint = Path(tempfile.mkdtemp()) / "run.ckpt"


def new_kernel():
    return apd.SGLD(model, step_size=1e-4, batch_size=100, thinning=10, seed=0)


rounds = []


def note(posterior, num_draws):
    probs_SNK = apd.outputs(model, posterior.get_samples(100, seed=1), data.x_test).probs_SNK
    score = float(apd.uncertainty.mutual_information(probs_SNK).mean())
    rounds.append((num_draws, apd.metrics.negative_log_likelihood(probs_SNK.mean(0), data.y_test), score))
    print(f"after {num_draws} draws a chain: NLL {rounds[-1][1]:.4f}, mean MI {score:.4f}")


def note_and_interrupt(posterior, num_draws):
    note(posterior, num_draws)
    if len(rounds) == 2:
        raise KeyboardInterrupt


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    early = apd.distill_online(
        new_kernel(),
        data.x_train,
        data.y_train,
        on_round=note_and_interrupt,
        checkpoint=checkpoint,
        **lengths,
        **settings,
    )
print(caught[-1].message)

# %% [markdown]
# The result is the posterior of the last round, with a warning that says so: an interrupted run returns a usable
# posterior. With `checkpoint=` it can also continue: the same call finds the file, which was written shortly before the
# second round. That round is repeated, with the same metrics as before.

# %%
online = apd.distill_online(
    new_kernel(), data.x_train, data.y_train, on_round=note, checkpoint=checkpoint, **lengths, **settings
)
print(f"{online.num_bytes:,} bytes, of {online.metadata['draws_seen']} draws a chain")

# %% [markdown]
# ## What does it lose?
#
# With the same kernel and seed, `apd.MCMC` gives exactly the same chains. `distill` sees all their draws, while the
# online generator saw those in the buffer. `compare` compares both with the stored chain.

# %%
mcmc = apd.MCMC(new_kernel(), disable_progbar=True, **lengths)
mcmc.run(data.x_train, data.y_train)
offline = apd.distill(mcmc, seed=0, progress=False)

candidates = {"offline": offline, "online": online, "online, interrupted": early}
found = {
    name: apd.diagnostics.compare(
        mcmc, posterior, model, data.x_test, data.y_test, num_samples=size(100, 16), seed=0,
        ood={"inverted": apd.datasets.inverted(data.x_test)},
    )
    for name, posterior in candidates.items()
}  # fmt: skip
table = {"accuracy": "accuracy", "nll": "NLL", "mean_mi": "mean MI", "mean_mi[inverted]": "mean MI, inverted digits"}
print(f"{'':26s}{'chain':>9s}" + "".join(f"{name:>21s}" for name in found) + f"{'resolution':>12s}")
for key, label in table.items():
    rows = [result[key] for result in found.values()]
    cells = "".join(f"{row.generator:21.4f}" for row in rows)
    print(f"{label:26s}{rows[0].chain:9.4f}{cells}{rows[0].resolution:12.4f}")

# %% [markdown]
# All differences are within the chain's resolution: these chains are too short to tell more. But a tendency can be
# seen, although it is not significant: on inverted digits, far from the data, the mutual information decreases from
# left to right, as each generator has seen less of the chains. The warnings above and here say what would help most: a
# longer warm-up of the chains.

# %%
figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.8), layout="constrained")
for ax, (name, result) in zip(axes, found.items(), strict=True):
    scores = result.per_input
    plots.score_scatter(scores["chain"]["mi"], scores["generator"]["mi"], ax)
    ax.set_title(name)

# %% [markdown]
# The scatter around the diagonal is narrow for the generator that saw all draws and for that of the buffer, and wider
# for that of half a run.
#
# ## With another driver
#
# `distill_online` needs a kernel of this package. For any other sampler, such as Pyro's NUTS, use `OnlineDistillation`,
# which holds the same kind of buffer and distils on request. It works as the statistics of Pyro's `StreamingMCMC`,
# which never stores draws, or with its `hook` as `hook_fn` of `MCMC`. A small regression:

# %%
generator = torch.Generator().manual_seed(0)
x = torch.randn(60, 2, generator=generator)
y = x @ torch.tensor([1.0, -0.5]) + 0.3 * torch.randn(60, generator=generator)


def regression(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    noise_scale = pyro.sample("noise_scale", dist.HalfCauchy(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, noise_scale), obs=y)


statistics = apd.OnlineDistillation(regression, data=(x, y), buffer_size=128, seed=0, progress=False)
pyro.set_rng_seed(0)
streaming = StreamingMCMC(
    NUTS(regression, jit_compile=False), num_samples=size(300, 40), warmup_steps=size(100, 10), statistics=statistics,
    disable_progbar=True,
)  # fmt: skip
streaming.run(x, y)
posterior = streaming.get_statistics()
for name, values in posterior.get_samples(1000, seed=0).items():
    print(f"{name:12s} mean {values.mean(0).tolist()}, sd {values.std(0).tolist()}")

# %% [markdown]
# The slopes were 1 and -0.5 and the noise 0.3, and the estimates are close to these. The posterior is an ordinary one:
# it can be saved, drawn from, and used as a guide. For three weights this only shows how it is done; NUTS on a model
# this small does not need it.
#
# ## When to use which
#
# * The draws fit in memory or on disk (`store="disk"`): run the chain, look at it, then use `distill`. The chain can be
#   diagnosed, and distilled again with other settings.
# * They do not fit: use `distill_online`. First diagnose a shorter run of the same kernel, because after this one there
#   is no chain to look at, and `compare` needs draws.
# * `restart=True` moves the chains to draws of the generator after each round: the "infinite chains" of the authors'
#   code. If the generator has lost something, the chains then lose it as well, and a warning says so.
#
# Next: [your own network and prior](09_your_own_network_and_prior.ipynb).
