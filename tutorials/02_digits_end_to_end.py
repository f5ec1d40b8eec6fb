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
# # 2. Digits end to end
#
# This tutorial goes from a model of handwritten digits to a file that generates networks: mini-batches in three ways,
# diagnostics, distillation, a report, saving and loading. The problem is larger than in [tutorial
# 1](01_first_distilled_posterior.ipynb): 3,760 weights and 1,438 images of 8 x 8 pixels, which are part of
# scikit-learn.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_apd as apd
from pyro_apd.diagnostics import plots

QUICK = os.environ.get("PYRO_APD_TUTORIAL_QUICK") == "1"  # a smoke test: everything runs, and little of it means much
torch.set_num_threads(1)  # for matrices this small, threads cost more than they give


def size(full, quick):
    return quick if QUICK else full


data = apd.datasets.digits(seed=0)
print(
    tuple(data.x_train.shape), tuple(data.x_test.shape), f"pixels in [{data.x_train.min():g}, {data.x_train.max():g}]"
)

# %% [markdown]
# ## Mini-batches, three ways
#
# The full-data potential counts the prior once and every datum once. On a batch of B rows out of N, the likelihood has
# to be multiplied by N/B. If this is forgotten, or done twice, the posterior has the wrong width, and there is no
# error. So the kernel does it, for each of three ways to write the code.
#
# **(i) The model subsamples itself**, with `subsample_size` in its plate and `pyro.subsample` on its data. The network
# must be *outside* the data plate, so that weights are drawn once and not once per datum.


# %%
class Digits(PyroModule):
    """A 64-50-10 network whose weights are sample sites."""

    def __init__(self, subsample_size=None):
        super().__init__()
        self.hidden, self.out = PyroModule[nn.Linear](64, 50), PyroModule[nn.Linear](50, 10)
        for layer in (self.hidden, self.out):
            for name, p in list(layer.named_parameters()):
                setattr(layer, name, PyroSample(dist.Normal(0.0, 0.4).expand(p.shape).to_event(p.dim())))
        self.subsample_size = subsample_size

    def forward(self, x, y=None):
        plate = pyro.plate("data", len(x), subsample_size=None if y is None else self.subsample_size)
        if y is not None:
            with plate:
                x, y = pyro.subsample(x, event_dim=1), pyro.subsample(y, event_dim=0)
        logits = self.out(torch.relu(self.hidden(x)))
        with plate:
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)


def sample(model, *arguments, **settings):
    """A short chain in Pyro's own driver."""
    kernel = apd.SGLD(model, step_size=1e-4, thinning=20, seed=0, **settings)
    mcmc = MCMC(kernel, num_samples=size(40, 5), warmup_steps=size(60, 5), disable_progbar=True)
    mcmc.run(*arguments)
    return mcmc.get_samples()


plain, subsampling = Digits(), Digits(subsample_size=100)
draws = {"(i) plate subsamples": sample(subsampling, data.x_train, data.y_train)}

# %% [markdown]
# **(ii) The model is written as for full-batch NUTS**: set `batch_size`, and pass the full tensors.
#
# **(iii) You have a `DataLoader`**: pass it to `run`.

# %%
loader = DataLoader(TensorDataset(data.x_train, data.y_train), batch_size=100, shuffle=True, drop_last=True)
draws["(ii) batch_size"] = sample(plain, data.x_train, data.y_train, batch_size=100)
draws["(iii) DataLoader"] = sample(plain, loader)

for name, values in draws.items():
    probs_SNK = apd.outputs(plain, values, data.x_test).probs_SNK
    accuracy = apd.metrics.accuracy(probs_SNK.mean(0), data.y_test)
    print(f"{name:22s} accuracy of the average {accuracy:.3f}, sd of a weight {values['out.weight'].std(0).mean():.3f}")

# %% [markdown]
# All three sample the same posterior. These chains are short. If a warm-up is too short for the draws that follow, a
# warning says so; the four chains below run longer. A model whose scaling cannot be verified is rejected. Here the
# network is inside the plate, where Pyro would draw different weights for each row:


# %%
def inside(x, y=None):
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Categorical(logits=plain.out(torch.relu(plain.hidden(x)))), obs=y)


try:
    sample(inside, data.x_train, data.y_train, batch_size=100)
except apd.ModelError as error:
    print(error)

# %% [markdown]
# ## Four chains
#
# `apd.BNN` declares such a model in one line. Four chains advance together; they start at draws from the prior. Read
# [gotchas](../docs/gotchas.md) on step size and warm-up before you trust your own chain.

# %%
model = apd.BNN(nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10)), "categorical", prior_scale=0.4)
kernel = apd.SGLD(model, step_size=1e-4, batch_size=100, thinning=40, seed=0)
mcmc = apd.MCMC(kernel, num_samples=size(150, 10), warmup_steps=size(250, 10), num_chains=4, disable_progbar=True)
mcmc.run(data.x_train, data.y_train)
print(mcmc.diagnostics()["temperatures"]["chain 0"][0])

# %% [markdown]
# ### Has it mixed?
#
# The code prints R-hat and effective sample sizes of all weights at once, and plots the potential of every draw. For a
# network, look at function values as well: weights have equivalent modes that one chain does not visit, predictions do
# not. An R-hat near 1 would mean that the chains agree.

# %%
found = apd.diagnostics.convergence(mcmc)
rhat = torch.cat([site["rhat"].flatten() for site in found.values()])
print(f"R-hat of weights: median {rhat.nanmedian():.3f}, 95 % of them below {rhat.nanquantile(0.95):.3f}")

probs_SNK = apd.outputs(model, mcmc.get_samples(), data.x_test[:200]).probs_SNK
log_odds_CSF = probs_SNK.reshape(4, -1, 200, 10)[..., 0].logit(eps=1e-6)
rhat = apd.diagnostics.convergence({"log odds": log_odds_CSF})["log odds"]["rhat"]
print(f"R-hat of predictions: median {rhat.nanmedian():.3f}, 95 % of them below {rhat.nanquantile(0.95):.3f}")

by_chain = mcmc.diagnostics()["potential"]
figure, ax = plt.subplots(figsize=(7, 3), layout="constrained")
_ = plots.trace(torch.stack([by_chain[f"chain {i}"] for i in range(4)]), ax)

# %% [markdown]
# The potential is constant on average, but R-hat says that the chains have *not* mixed, less clearly for predictions
# than for weights. They are kept short here, to finish in a minute. For real use, let them run until R-hat of the
# predictions is close to 1. A generator is only as good as its chains, and the last lines of `compare` below say how
# much the chains differ from each other.
#
# ## Distillation, and what was lost
#
# `distill` needs a few seconds. It runs the model on the data a few times, and finds for each layer the directions in
# which its inputs vary. In these directions the draws are kept finely, as a mean and a basis for each chain, in
# integers with an entropy code; in the others coarsely. Two numbers are then calibrated, so that generated networks
# disagree as much as those of the chain.
#
# The chain's metrics are of draws that `distill` held out. The column of stored draws shows the result of stored draws
# of the same number of bytes. A generator is useful where it is nearer to the chain than these are. Draws in two bits
# per weight are a stronger baseline: more than ten times as many fit. Each rounding error is passed on to weights that
# are not yet rounded, because rounding alone would ruin the networks.

# %%
posterior = apd.distill(mcmc, seed=0, progress=False)
ood = {"noise": apd.datasets.noise(data.x_test, seed=0), "inverted": apd.datasets.inverted(data.x_test)}
fidelity = apd.diagnostics.compare(
    mcmc, posterior, model, data.x_test, data.y_test, ood=ood, num_samples=size(100, 16), seed=0,
)  # fmt: skip
print(fidelity)

# %% [markdown]
# For a network as small as this, and several chains in different modes, draws in two bits are about as good as the
# generator. For larger networks they need three to four times the bytes to be as near to the chain, input by input
# ([results](../benchmarks/RESULTS.md)).
#
# The figure shows each test image's mutual information by chain and generator, and how well both separate digits from
# other images.

# %%
chain, generator = fidelity.per_input["chain"], fidelity.per_input["generator"]
figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
plots.score_scatter(chain["mi"], generator["mi"], axes[0])
for ax, scores, title in zip(axes[1:], (chain, generator), ("SGLD", "APD"), strict=True):
    outside = {name: scores[f"mi[{name}]"] for name in ood}
    plots.score_histograms(scores["mi"], outside, ax, score="mutual information (nats)", upper=2.0, title=title)

# %% [markdown]
# ## Save, load, predict
#
# `byte_budget=` limits the size of the file, here to four networks. More bytes are more exact. To use the file, none of
# the training code is needed, and nothing in the file is executed. Pyro's own `Predictive` accepts the loaded
# posterior as a guide; `apd.Predictive` is the same call, vectorised.

# %%
folder = Path(tempfile.mkdtemp())
posterior.metadata["data"] = apd.fingerprint(data.x_train, data.y_train)
small = apd.distill(mcmc, byte_budget=4.0, seed=0, progress=False)
for name, saved in {"default": posterior, "small": small}.items():
    saved.save(folder / f"{name}.safetensors")
    num_bytes = (folder / f"{name}.safetensors").stat().st_size
    print(f"{name}: {num_bytes:,} bytes, {num_bytes / fidelity.num_bytes['network']:.1f} networks")

loaded = apd.DistilledPosterior.load(folder / "default.safetensors")
labels_SN = apd.Predictive(model, guide=loaded, num_samples=100)(data.x_test)["obs"]
print(f"majority of 100 drawn labels is right on {(labels_SN.mode(0).values == data.y_test).float().mean():.1%}")

# %% [markdown]
# Which digits are difficult? The eight test images on which its networks disagree most:

# %%
probs_SNK = apd.outputs(model, loaded.get_samples(200, seed=0), data.x_test).probs_SNK
scores = apd.uncertainty.mutual_information(probs_SNK)
figure, axes = plt.subplots(1, 8, figsize=(12, 1.9), layout="constrained")
for ax, n in zip(axes, scores.argsort(descending=True)[:8].tolist(), strict=True):
    ax.imshow(data.x_test[n].reshape(8, 8).numpy(), cmap="gray_r")
    ax.set_title(f"{probs_SNK.mean(0)[n].argmax()}? it is {data.y_test[n]}\nMI {scores[n]:.2f}", fontsize=9)
    ax.axis("off")

# %% [markdown]
# ## The report
#
# One HTML page with all of this, to send to others: no network access, no JavaScript. `pyro-apd report` makes it from
# files.

# %%
path = apd.diagnostics.report(
    mcmc, posterior, model, data.x_test, data.y_test, ood=ood, fidelity=fidelity, path=folder / "report.html", seed=0
)
print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")

# %% [markdown]
# Next: [is it any good?](03_is_it_any_good.ipynb)
