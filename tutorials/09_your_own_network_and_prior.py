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
# # 9. Your own network and prior
#
# This tutorial goes from any `torch.nn.Module` to a posterior: a convolutional network, priors per layer, and a prior
# that is learned. Then it shows what long runs need: another device, checkpoints, several processes.

# %%
import os
import tempfile
import warnings
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import nn

import pyro_apd as apd

QUICK = os.environ.get("PYRO_APD_TUTORIAL_QUICK") == "1"  # a smoke test: everything runs, and little of it means much
torch.set_num_threads(1)  # for matrices this small, threads cost more than they give


def size(full, quick):
    return quick if QUICK else full


# %% [markdown]
# ## A network and its prior in one line
#
# `apd.BNN` copies the network and puts a prior on every parameter that requires gradients. Batch normalisation and
# dropout are switched to evaluation mode, with a warning: given its weights, a Bayesian network is a function.
#
# `prior_scale` accepts a number (the standard deviation of a normal prior), `"fan_in"`, a distribution, or a mapping
# from names of layers to these, in which the longest matching name is used.

# %%
data = apd.datasets.digits(seed=0)
device = "cuda" if torch.cuda.is_available() else "cpu"


def images(x):
    return x.reshape(-1, 1, 8, 8)


net = nn.Sequential(
    nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)
)
model = apd.BNN(
    net,
    "categorical",
    prior_scale={"": "fan_in", "6": 0.4, "0.weight": dist.Laplace(0.0, 0.5)},
).to(device)
for site, prior in model.priors.items():
    base = getattr(prior, "base_dist", prior)
    print(f"{site:14s} {tuple(prior.shape())!s:18s} {type(base).__name__}, sd {base.stddev.flatten()[0]:.3f}")

# %% [markdown]
# ## A run with checkpoints
#
# A GPU is used if the data are on one; nothing else changes. With `checkpoint=` a run that was killed resumes where it
# stopped, bit for bit. Below it is interrupted on purpose, as by Ctrl-C.

# %%
x_train, x_test = images(data.x_train).to(device), images(data.x_test).to(device)
y_train, y_test = data.y_train.to(device), data.y_test.to(device)
folder = Path(tempfile.mkdtemp())
length = size(60, 6)


def prepared(name, hook=None):
    kernel = apd.SGLD(model, step_size=1e-4, batch_size=100, thinning=size(10, 2), seed=0)
    return apd.MCMC(
        kernel, length, length, num_chains=2, checkpoint=folder / name, checkpoint_every=2, hook_fn=hook,
        disable_progbar=True,
    )  # fmt: skip


def interrupt(kernel, params, stage, step):
    if stage == "Sample" and step == length // 2:
        raise KeyboardInterrupt


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    prepared("run", hook=interrupt).run(x_train, y_train)
print(caught[-1].message)

resumed = prepared("run")
resumed.run(x_train, y_train)
whole = prepared("whole")
whole.run(x_train, y_train)
same = all(torch.equal(whole.get_samples()[name], value) for name, value in resumed.get_samples().items())
print("the resumed run and one in a single piece have the same draws:", same)

# %% [markdown]
# `store="disk"` keeps draws in files instead of memory, and everything that accepts an `MCMC` reads them from there.
#
# ## Distil, predict
#
# Everything after sampling is as for any other network.

# %%
posterior = apd.distill(resumed, num_steps=size(100, 5), seed=0, progress=False)
fidelity = apd.diagnostics.compare(resumed, posterior, model, x_test, y_test, num_samples=size(80, 8), seed=0)
print(fidelity.verdict)
for name in ("accuracy", "nll", "mean_mi"):
    row = fidelity[name]
    print(f"{row.label:16s} chain {row.chain:.4f}   generator {row.generator:.4f}   resolution {row.resolution:.4f}")

# %% [markdown]
# One draw as a plain `nn.Module`, for exporters and for code without Pyro. The figure shows its filters:

# %%
figure, axes = plt.subplots(2, 8, figsize=(10, 2.8), layout="constrained")
for row, draw in zip(axes, (posterior.sample(), posterior.sample()), strict=True):
    one = posterior.network(draw, net=model)
    for ax, kernel in zip(row, one[0].weight.detach().cpu(), strict=True):
        ax.imshow(kernel[0].numpy(), cmap="RdBu", vmin=-1.5, vmax=1.5)
        ax.axis("off")
_ = figure.suptitle("The first layer of two draws")

# %% [markdown]
# ## A model of your own
#
# Any Pyro model with continuous latents works if weights are drawn *outside* the data plate. Here the scale of the
# prior is itself a latent: each layer learns how large its weights are (MacKay 1992, Neal 1996). It is positive, and
# sampled in an unconstrained space like any other latent.


# %%
class Hierarchical(PyroModule):
    """A perceptron whose layers learn the scale of their prior."""

    def __init__(self, sizes=(64, 30, 10)):
        super().__init__()
        self.layers = PyroModule[nn.ModuleList]([PyroModule[nn.Linear](a, b) for a, b in pairwise(sizes)])
        for i, layer in enumerate(self.layers):
            inputs = layer.in_features
            for name, p in list(layer.named_parameters()):
                share = inputs**-0.5 if name == "weight" else 1.0

                def prior(module, i=i, shape=p.shape, share=share):
                    scale = getattr(self, f"scale_{i}")
                    return dist.Normal(0.0, share * scale).expand(shape).to_event(len(shape))

                setattr(layer, name, PyroSample(prior))
            setattr(self, f"scale_{i}", PyroSample(dist.LogNormal(0.0, 0.5)))

    def forward(self, x, y=None):
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        logits = self.layers[-1](x)
        with pyro.plate("data", len(logits)):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)


own = Hierarchical().to(device)
kernel = apd.SGLD(own, step_size=1e-4, batch_size=100, thinning=size(10, 2), seed=0)
mcmc = apd.MCMC(kernel, length, length, num_chains=2, disable_progbar=True)
mcmc.run(data.x_train.to(device), y_train)
for site in ("scale_0", "scale_1"):
    draws = mcmc.get_samples()[site]
    print(f"{site}: {draws.mean():.2f} ± {draws.std():.2f} (the prior's median is 1)")

# %% [markdown]
# ## Several processes
#
# Chains are independent, so several machines or GPUs need no communication while they sample. Under `torchrun
# --nproc-per-node 4 chains.py`, each process reads its rank, runs its own chains with its own seed, and writes them to
# its own folder; one process then reads them all. Here the same function is called for two ranks, one after the other.


# %%
def chains(rank, folder):
    """What one process of torchrun does; ``rank`` is ``int(os.environ["RANK"])`` there."""
    kernel = apd.SGLD(model, step_size=1e-4, batch_size=100, thinning=size(10, 2), seed=100 + rank)
    mcmc = apd.MCMC(kernel, length, length, num_chains=2, disable_progbar=True, store="disk",
                    store_path=folder / f"rank{rank}")  # fmt: skip
    mcmc.run(x_train, y_train)


for rank in range(2):
    chains(rank, folder)

stores = [apd.open_store(folder / f"rank{rank}").samples() for rank in range(2)]
together = {name: torch.cat([store[name] for store in stores]) for name in stores[0]}
print({name: tuple(value.shape) for name, value in together.items()})
posterior = apd.distill(together, model, data=(x_train, y_train), group_by_chain=True, num_steps=size(100, 5), seed=0,
                        progress=False)  # fmt: skip
print(f"{posterior.num_bytes:,} bytes, from {posterior.metadata['num_chains']} chains")

# %% [markdown]
# Next: [writing a kernel for Pyro's MCMC](10_a_kernel_for_pyros_mcmc.ipynb).
