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
# A generator can give the right labels and still be useless as a posterior: if it always draws the same network, the
# accuracy is right and the uncertainty is lost. This tutorial reads the table of `compare` for a generator from
# `distill` and for three candidates with planted faults. It also shows the result when the chain itself is bad. The
# data are two half moons, so that every fault can be plotted.

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
# Four chains of SGLD, and `distill`. The network is small, and its draws differ widely: the mean of a few of them is
# not a good network. The generator therefore holds 200 of the chain's networks themselves, in few bytes, and repeats
# them. `compare` says so, and judges it by what it predicts.

# %%
net = nn.Sequential(nn.Linear(2, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 2))
model = apd.BNN(net, "categorical", prior_scale="fan_in")
kernel = apd.SGLD(model, step_size=5e-3, thinning=size(60, 5), seed=0)
mcmc = apd.MCMC(kernel, num_samples=size(200, 40), warmup_steps=size(200, 10), num_chains=4, disable_progbar=True)
mcmc.run(x, y)
settings = {"num_steps": size(None, 5), "seed": 0, "progress": False}
posterior = apd.distill(mcmc, **settings)


def judged(candidate, **settings):
    return apd.diagnostics.compare(mcmc, candidate, model, x_test, y_test, ood={"far": far}, seed=0, **settings)


fidelity = judged(posterior)
print(fidelity)

# %% [markdown]
# ## Reading the table
#
# * **The first line is the verdict** on the whole posterior. It is based on function space; and on copied draws, unless
#   the posterior itself says that it repeats some. Weights are not identified, so their rows only help to explain.
# * **SGLD**: the metric of held-out draws of the chain. The generator should reproduce it, *not* exceed it.
# * **generator**: the same metric of as many draws of the generator.
# * **stored**: the same metric of stored draws, as many as fit into the bytes of the generator's file. For a network
#   this small they are many, and hard to beat. For a large network they are one or two; then give `compare` a stronger
#   baseline, as in [tutorial 2](02_digits_end_to_end.ipynb).
# * **resolution**: differences up to this value are Monte-Carlo error. A large one means that nothing can be decided,
#   not that everything is right. More draws of a longer chain make it smaller.
# * **verdict** per row. *loses* and *overstates* are losses beyond the resolution; *departs* is a difference in the
#   better direction, which is also a difference. *Repeats networks, as it says* is no loss: see the notes below the
#   table.
#
# Metrics of similarity (agreement, total variation, correlations) compare halves: the chain's column compares one half
# of the chain with the other, and a perfect generator reaches that number, not 1.
#
# The table is a `pandas.DataFrame`, so you can query it.

# %%
print(fidelity.status)
row = fidelity["mean_mi"]
print(f"{row.label}: chain {row.chain:.3f}, generator {row.generator:.3f}, resolution {row.resolution:.3f}")
fidelity.loc[fidelity["status"] != "indistinguishable", ["label", "chain", "generator", "resolution", "verdict"]]

# %% [markdown]
# ## Far from the data
#
# `far` has inputs up to four units from any datum. A generator is calibrated to agree with the chain at inputs near the
# data and on variations of them, so far from them it can be worse. If you need other inputs, pass them as
# `probe_inputs`: model arguments on whose rows generator and chain are to agree. Here these are points all over the
# plane (different from those in `far`). They change nothing here, since this generator holds networks of the chain,
# which are right everywhere. The table above shows that this chain cannot resolve the difference that is left.

# %%
plane = torch.rand(400, 2, generator=torch.Generator().manual_seed(5)) * 10 - 3
probed = apd.distill(mcmc, probe_inputs=(torch.cat([x, plane]),), **settings)
again = judged(probed)
for name in ("mean_mi", "mean_mi[far]", "auroc_entropy[far]"):
    row, other = fidelity[name], again[name]
    print(f"{name:18s} chain {row.chain:.3f}, distilled {row.generator:.3f}, with probes {other.generator:.3f}")

# %% [markdown]
# ## Planted faults
#
# `compare` also accepts a dict of draws as a posterior, so faults are easy to plant:
#
# * **collapsed**: always the same network, with a little noise;
# * **narrow**: every weight halfway between the draws and one of them;
# * **memorised**: twenty draws of the chain, repeated.

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
# ### Metrics that detect it, and metrics that do not
#
# By accuracy alone, all of them would pass, and by NLL the memorised draws, too. The mutual information, the distance
# between two draws and the share of new draws detect the collapsed generator. The last two also detect the memorised
# draws, and find that the distilled ones repeat as well. The narrow one mainly loses NLL: halfway between two good
# networks there need not be a good one.

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
# The figure shows the model's uncertainty over the plane. The collapsed generator has a border between the moons, that
# of its one network, and no uncertainty anywhere.

# %%
shown = {"SGLD": {name: value[index] for name, value in chain.items()}, "APD": posterior.get_samples(count, seed=0)}
shown["collapsed"] = candidates["collapsed"]
figure, axes = plt.subplots(3, 2, figsize=(9, 10.5), layout="constrained")
_ = plots.decision_surfaces(model, shown, x, y, axes=list(axes.flat))

# %% [markdown]
# The next figure compares them input by input: on the diagonal the two agree, at zero the generator has collapsed. The
# distilled generator lies around the diagonal. The mutual information of the narrow one is right on average, but has
# little relation to the chain's.

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
for ax, name in zip(axes, ("distilled", "collapsed", "narrow"), strict=True):
    scores = found[name].per_input
    plots.score_scatter(scores["chain"]["mi"], scores["generator"]["mi"], ax)
    ax.set_title(name)

# %% [markdown]
# ## When the chain is bad
#
# A generator cannot be better than its chain. Here the step size is far too small and there is no warm-up, so the
# chains have hardly left their starting points. Sampling may detect this and warn. Here it does not, and no warning is
# printed below. But whatever the generator does, `compare` does not accept it.

# %%
kernel = apd.SGLD(model, step_size=2e-5, thinning=size(20, 2), seed=0)
unmixed = apd.MCMC(kernel, num_samples=size(100, 40), warmup_steps=0, num_chains=4, disable_progbar=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    unmixed.run(x, y)
for warning in caught:
    print(f"{warning.category.__name__}: {warning.message}\n")
fitted = apd.distill(unmixed, seed=0, progress=False)
print(apd.diagnostics.compare(unmixed, fitted, model, x_test, y_test, seed=0).verdict)

# %% [markdown]
# The trace of the potential shows the reason: the good chains are level and overlap; these drift, each in a different
# region.

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
# * *loses mutual information*: more coordinates (`rank`), a larger `byte_budget` if you gave one, more draws, or a
#   training after the fit (`num_steps`).
# * *draws that copy no other* below 1: memorised draws, or a generator that holds some of the chain's, and says so.
# * *too few independent draws to tell*: a larger `num_samples=`, and a chain that is long enough for it.
#
# `apd.diagnostics.report` puts all of this on one page. See also [diagnostics](../docs/diagnostics.md). Next:
# [regression](07_regression_with_learned_noise.ipynb).
