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
# # 1. Your first distilled posterior
#
# This tutorial shows what the posterior of a Bayesian neural network looks like, how to sample it with Pyro's own
# driver, and how to turn the samples into one small file that generates any number of new networks. The data are twenty
# points in the plane, so that everything can be plotted. It is the toy problem of the paper (Wang et al., ICML 2018,
# figure 2). You need to know what a Pyro model is.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import pyro_apd as apd
from pyro_apd.diagnostics import plots

QUICK = os.environ.get("PYRO_APD_TUTORIAL_QUICK") == "1"  # a smoke test: everything runs, and little of it means much
torch.set_num_threads(1)  # for matrices this small, threads cost more than they give


def size(full, quick):
    return quick if QUICK else full


# %% [markdown]
# ## The data
#
# Two clusters of ten points.

# %%
generator = torch.Generator().manual_seed(0)
y = torch.arange(20) % 2
x = (4.0 * y[:, None] - 2.0) + 0.3**0.5 * torch.randn(20, 2, generator=generator)

# %% [markdown]
# ## The model
#
# `apd.BNN` puts a prior on every weight of a `torch.nn.Module` and adds a likelihood. It is an ordinary Pyro model. You
# can also write your own model, as in [tutorial 9](09_your_own_network_and_prior.ipynb). The prior says which networks
# are possible before any data: here every weight is normal with standard deviation 1.

# %%
model = apd.BNN(
    nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 2)), prior_scale=1.0
)
print(model)

# %% [markdown]
# ## Sampling
#
# `SGLD` is a kernel for Pyro's `MCMC`. Each *Langevin step* follows the negative gradient of the potential (the
# negative log joint density) and adds noise of the matching variance. One draw is kept every `thinning` steps.
# `apd.MCMC` is Pyro's driver with additions: it runs several chains as one batched computation. Twenty points need no
# mini-batches.
#
# The progress bar is switched off here to keep the page short; leave `disable_progbar` out when you try it.

# %%
kernel = apd.SGLD(model, step_size=0.01, thinning=40, seed=0)
mcmc = apd.MCMC(kernel, num_samples=size(250, 60), warmup_steps=size(100, 20), num_chains=4, disable_progbar=True)
mcmc.run(x, y)
draws = mcmc.get_samples()
print({name: tuple(value.shape) for name, value in draws.items()})

# %% [markdown]
# ### Is the step size right?
#
# SGLD has no accept step, so a step size that is too large gives no error: the draws are too wide. The chain's
# *temperature* shows this. It is estimated from the gradients. The correct value is 1; a few per cent above 1 is the
# effect of a finite step size.

# %%
for reading in kernel.temperatures():
    print(reading)

# %% [markdown]
# ## What a posterior looks like
#
# Every draw is a complete network. The figure shows six of them, each with its probability of class 1 at every point of
# the plane. Near the data they agree, because the data determine the prediction. Elsewhere they disagree, and this
# disagreement is the uncertainty of the model.

# %%
sides = torch.linspace(-5, 5, 60)
grid = torch.stack(torch.meshgrid(sides, sides, indexing="xy"), -1).flatten(0, 1)
chosen = torch.linspace(0, len(draws["net.0.bias"]) - 1, 6).long()
probs_SNK = apd.outputs(model, {name: value[chosen] for name, value in draws.items()}, grid).probs_SNK

figure, axes = plt.subplots(2, 3, figsize=(9, 6), sharex=True, sharey=True, layout="constrained")
for ax, probs_NK in zip(axes.flat, probs_SNK, strict=True):
    surface = probs_NK[:, 1].reshape(60, 60)
    image = ax.contourf(sides, sides, surface, levels=torch.linspace(0, 1, 11).tolist(), cmap="RdBu", alpha=0.6)
    for label, marker, face in ((0, "o", "white"), (1, "s", "black")):
        ax.scatter(*x[y == label].T, marker=marker, c=face, edgecolors="black", s=24, label=f"class {label}")
axes[0, 0].legend(loc="lower right", fontsize="small")
figure.colorbar(image, ax=axes, label="probability of class 1")
_ = figure.suptitle("Six networks of one posterior")

# %% [markdown]
# ## Distillation
#
# The chain's draws are many networks. `distill` fits a generator, a function from noise to weights, that draws from the
# same distribution. It looks at the inputs that each layer gets on the data. Weights along the directions in which
# these inputs vary determine the predictions, and are kept finely. All others are kept coarsely;
# [concepts](../docs/concepts.md) has a picture of this. A fifth of the chain is held out, for the comparison below.
#
# It takes seconds. This chain mixes well, so that its networks have little in common that could be left out. Then the
# generator holds some of them, here 200, and repeats them, apart from noise; `print` says so. Larger networks, and
# chains that mix slowly, have generators that draw endlessly many networks.

# %%
posterior = apd.distill(mcmc, num_steps=size(None, 5), seed=0, progress=False)
posterior

# %% [markdown]
# The generator can be used wherever Pyro accepts a posterior: with `get_samples` as after MCMC, or as a guide as after
# SVI. Below are 300 networks of the chain (SGLD) and of the generator (labelled APD). Left: the averaged prediction.
# Right: how much the networks disagree (the mutual information of label and weights). The generator must reproduce this
# uncertainty of the chain. The two rows are similar but not equal: compare them close to the points.

# %%
generated = posterior.get_samples(300)
thinned = {name: value[:: max(1, len(value) // 300)][:300] for name, value in draws.items()}
figure, axes = plt.subplots(2, 2, figsize=(9, 7.4), layout="constrained")
_ = plots.decision_surfaces(model, {"SGLD": thinned, "APD": generated}, x, y, axes=list(axes.flat))

# %% [markdown]
# ## In weight space
#
# The same draws in the plane of their first two principal components. Chains that started at different draws from the
# prior can end in different modes. Networks have many equivalent modes with the same predictions. For this reason the
# tables of this package compare functions first and weights last. Here the two sets of points do not lie exactly on
# each other, although the surfaces above are similar.


# %%
def flat(samples):
    return torch.cat([samples[name].flatten(1) for name in sorted(samples)], 1)


figure, ax = plt.subplots(figsize=(5.5, 5), layout="constrained")
_ = plots.principal_pair(flat(draws), flat(posterior.get_samples(len(draws["net.0.bias"]))), ax)

# %% [markdown]
# ## What was lost
#
# `compare` shows metrics of both side by side, with the verdict above the table. The verdict is based on functions.
# *Resolution* is the difference that chance alone would cause. [Tutorial 3](03_is_it_any_good.ipynb) explains these
# tables. The column of stored draws has as many draws as fit into the bytes of the file. For networks as small as this,
# these are many draws, and they are hard to beat.

# %%
x_new = 8 * torch.rand(200, 2, generator=generator) - 4
fidelity = apd.diagnostics.compare(mcmc, posterior, model, x_new, seed=0)
print(fidelity)

# %% [markdown]
# ## One small file
#
# The file contains plain tensors and JSON; nothing in it is executed when it is read. The same seed gives the same
# networks.

# %%
path = Path(tempfile.mkdtemp()) / "posterior.safetensors"
posterior.save(path)
loaded = apd.DistilledPosterior.load(path)
assert torch.equal(loaded.get_samples(5, seed=1)["net.0.bias"], posterior.get_samples(5, seed=1)["net.0.bias"])
chain_bytes = sum(value.numel() * value.element_size() for value in draws.values())
print(f"chain: {chain_bytes:,} bytes   file: {path.stat().st_size:,} bytes")

# %% [markdown]
# For a network of 162 weights little is gained, because a part of the file has a fixed size. For a network of 80,000
# weights a file is about as large as one network, and gives any number of draws. Next: [digits end to
# end](02_digits_end_to_end.ipynb).
