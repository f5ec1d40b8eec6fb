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
# # 3. Is it any good?
#
# A generator can give the right labels and be worthless as a posterior: if it always draws the same network, accuracy
# is as it should be and nothing is left of the uncertainty. This tutorial reads the table of `compare` on what
# `distill` made and on three that are broken on purpose, and shows what it says when the fault is the chain's. The data
# are two half moons, so that every fault can be seen.

# %%
import os
import warnings

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import make_moons
from torch import nn

import pyro_apd as apd
from pyro_apd.diagnostics import plots

QUICK = os.environ.get("PYRO_APD_TUTORIAL_QUICK") == "1"  # a smoke test: everything runs, and little of it means much
torch.set_num_threads(1)  # for matrices this small, threads cost more than they give


def size(full, quick):
    return quick if QUICK else full


def moons(count, seed):
    x, y = make_moons(count, noise=0.25, random_state=seed)
    return torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y)


(x, y), (x_test, y_test) = moons(100, 0), moons(300, 1)
far = torch.rand(300, 2, generator=torch.Generator().manual_seed(2)) * 4 + torch.tensor([3.0, 1.5])

# %% [markdown]
# ## A chain, and a generator
#
# Four chains of SGLD, and `distill` with its defaults.

# %%
net = nn.Sequential(nn.Linear(2, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 2))
model = apd.BNN(net, "categorical", prior_scale="fan_in")
kernel = apd.SGLD(model, step_size=5e-3, thinning=size(20, 5), seed=0)
mcmc = apd.MCMC(kernel, num_samples=size(200, 40), warmup_steps=size(150, 10), num_chains=4, disable_progbar=True)
mcmc.run(x, y)
posterior = apd.distill(mcmc, num_steps=size(400, 10), seed=0, progress=False)


def judged(candidate, **settings):
    return apd.diagnostics.compare(mcmc, candidate, model, x_test, y_test, ood={"far": far}, seed=0, **settings)


fidelity = judged(posterior)
print(fidelity)

# %% [markdown]
# ## Reading the table
#
# * **The first line is the verdict** on the whole. It rests on function space and on copies; weights are
#   unidentified, and their rows only explain.
# * **SGLD**: the figure of held-out draws of the chain. It is what the generator should reproduce, *not* to be
#   beaten.
# * **generator**: the same of as many of its draws.
# * **stored**: the same of as many stored draws as fit in the bytes of the generator's file. On a network this small
#   there are many of them, and they are hard to beat.
# * **resolution**: differences up to this are Monte-Carlo error. A large one means that nothing can be said, not that
#   all is well: more draws of a longer chain make it smaller.
# * **verdict** by row. *loses* and *overstates* are losses beyond the resolution; *departs* is a difference to the
#   better side, which is a difference all the same.
#
# Likenesses (agreement, total variation, correlations) compare halves: the chain's column is one half of the chain
# against the other, and a perfect generator gets that number, not 1.
#
# It is a `pandas.DataFrame`, so you can ask it things.

# %%
print(fidelity.status)
row = fidelity["mean_mi"]
print(f"{row.label}: chain {row.chain:.3f}, generator {row.generator:.3f}, resolution {row.resolution:.3f}")
fidelity.loc[fidelity["status"] != "indistinguishable", ["label", "chain", "generator", "resolution", "verdict"]]

# %% [markdown]
# ## Far from the data
#
# `far` lies up to four units from any datum. A generator is trained to agree with the chain at inputs near the data
# and on variations of them, so that this is where it is worst. If you will look there, say so: `probe_inputs` are the
# model's arguments at whose rows the two are to agree, here points all over the plane (other ones than in `far`). Both
# figures of `far` come nearer to the chain's with them; the table above says how little of that this chain can
# resolve.

# %%
plane = torch.rand(400, 2, generator=torch.Generator().manual_seed(5)) * 10 - 3
probed = apd.distill(mcmc, num_steps=size(400, 10), seed=0, probe_inputs=(torch.cat([x, plane]),), progress=False)
again = judged(probed)
for name in ("mean_mi", "mean_mi[far]", "auroc_entropy[far]"):
    row, other = fidelity[name], again[name]
    print(f"{name:18s} chain {row.chain:.3f}, distilled {row.generator:.3f}, with probes {other.generator:.3f}")

# %% [markdown]
# ## Broken on purpose
#
# `compare` takes a dict of draws for a posterior as well, so faults are easily planted:
#
# * **collapsed**: always the same network, with a little noise;
# * **narrow**: every weight halfway between the draws and one of them;
# * **memorised**: twenty draws of the chain, again and again.

# %%
chain = mcmc.get_samples()
pick = torch.Generator().manual_seed(3)
count = 200
index = torch.randint(len(chain["net.0.bias"]), (count,), generator=pick)
few = index[torch.arange(count) % 20]
last = {name: value[-1] for name, value in chain.items()}


def narrowed(name, share):
    """Draws pulled towards the last draw of the chain."""
    return last[name] + share * (chain[name][index] - last[name])


candidates = {
    "distilled": posterior,
    "collapsed": {name: narrowed(name, 0.05) for name in chain},
    "narrow": {name: narrowed(name, 0.5) for name in chain},
    "memorised": {name: value[few] for name, value in chain.items()},
}
found = {name: fidelity if candidate is posterior else judged(candidate) for name, candidate in candidates.items()}
for name, result in found.items():
    print(f"{name:10s} {result.status}: {result.verdict}\n")

# %% [markdown]
# ### Figures that see it, and figures that do not
#
# By accuracy and NLL alone one would ship the collapsed generator, and the memorised draws. The mutual information, the
# distance between two draws and the share of new draws see the one; of the rows below, only the share of new draws sees
# the other. The narrow one loses accuracy first of all: halfway between two networks there need not be one that works.

# %%
names = ["accuracy", "nll", "mean_mi", "mean_mi[far]", "auroc_mi[far]", "disagreement", "new_draws"]
print(f"{'':30s}{'chain':>10s}" + "".join(f"{name:>11s}" for name in found))
for name in names:
    rows = [result[name] for result in found.values()]
    marks = ["*" if row.status in ("loses", "departs") else " " for row in rows]
    cells = [f"{row.generator:10.3f}{mark}" for row, mark in zip(rows, marks, strict=True)]
    print(f"{rows[0].label + name[len(name.partition('[')[0]) :]:30s}{rows[0].chain:10.3f}" + "".join(cells))
print("\n* differs from the chain by more than the resolution")

# %% [markdown]
# And to see: the uncertainty of the model over the plane. The collapsed generator has a border between the moons, that
# of its one network, and no doubts about any place at all.

# %%
shown = {"SGLD": {name: value[index] for name, value in chain.items()}, "APD": posterior.get_samples(count, seed=0)}
shown["collapsed"] = candidates["collapsed"]
figure, axes = plt.subplots(3, 2, figsize=(9, 10.5), layout="constrained")
_ = plots.decision_surfaces(model, shown, x, y, axes=list(axes.flat))

# %% [markdown]
# Input by input: on the diagonal the two agree, on the floor one has collapsed. The one distilled lies along the
# diagonal, a little above it: it is somewhat less sure than the chain. The mutual information of the narrow one is
# right on average, and has little to do with the chain's.

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
for ax, name in zip(axes, ("distilled", "collapsed", "narrow"), strict=True):
    scores = found[name].per_input
    plots.score_scatter(scores["chain"]["mi"], scores["generator"]["mi"], ax)
    ax.set_title(name)

# %% [markdown]
# ## When the chain is at fault
#
# A generator can be no better than its chain. Here a step size far too small and no warm-up: the chains have hardly
# left where they started. Sampling may notice by itself, and would then warn; here it does not, and no warning is
# printed below. Whatever the generator does, `compare` does not pass it.

# %%
kernel = apd.SGLD(model, step_size=2e-5, thinning=size(20, 2), seed=0)
unmixed = apd.MCMC(kernel, num_samples=size(100, 40), warmup_steps=0, num_chains=4, disable_progbar=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    unmixed.run(x, y)
for warning in caught:
    print(f"{warning.category.__name__}: {warning.message}\n")
fitted = apd.distill(unmixed, num_steps=size(100, 5), seed=0, progress=False)
print(apd.diagnostics.compare(unmixed, fitted, model, x_test, y_test, seed=0).verdict)

# %% [markdown]
# The trace of the potential shows why: the good chains are level and overlap, these wander, each in a place of its own.

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
for ax, (name, run) in zip(axes, {"mixed": mcmc, "on its way": unmixed}.items(), strict=True):
    potential = run.diagnostics()["potential"]
    plots.trace(torch.stack([potential[f"chain {i}"] for i in range(4)]), ax)
    ax.set_title(name)

# %% [markdown]
# ## What to do
#
# * *too poorly mixed*: longer chains, more warm-up, a larger step size (`step_size="auto"` finds one).
# * *loses mutual information*: more training steps (`num_steps`), more coordinates (`rank`), more draws.
# * *draws that copy no other* below 1: too few draws for the generator's size, or not a generator at all.
# * *too few independent draws to tell*: `num_samples=` larger, and a chain that is long enough for it.
#
# `apd.diagnostics.report` puts all of this on one page. More in [diagnostics](../docs/diagnostics.md). Next:
# [regression](07_regression_with_learned_noise.ipynb).
