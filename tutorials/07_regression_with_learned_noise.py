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
# # 7. Regression with learned noise
#
# How strong is concrete of a given recipe and age? A network predicts it, and the noise of the measurements is learned
# together with the weights. The noise scale is one more latent variable. It is positive, and the kernel samples it in
# an unconstrained space; the generator reproduces it. The step size is found during warm-up.
#
# The data are UCI's concrete compressive strength (Yeh 1998; 1,030 rows, 8 columns) if the environment variable
# `PYRO_APD_DATA` names a folder with `uci/concrete.txt`. Otherwise they are the diabetes data in scikit-learn.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_diabetes
from torch import nn

import pyro_apd as apd
from pyro_apd.diagnostics import plots

QUICK = os.environ.get("PYRO_APD_TUTORIAL_QUICK") == "1"  # a smoke test: everything runs, and little of it means much
torch.set_num_threads(1)  # for matrices this small, threads cost more than they give


def size(full, quick):
    return quick if QUICK else full


table = Path(os.environ.get("PYRO_APD_DATA", "")) / "uci" / "concrete.txt"
if table.exists():
    name, unit, rows = "concrete", "MPa", np.loadtxt(table)
else:
    name, unit, rows = "diabetes", "points", np.column_stack(load_diabetes(return_X_y=True))
print(f"{name}: {rows.shape[0]} rows, {rows.shape[1] - 1} columns, target in {unit}")

# %% [markdown]
# ## Data in suitable units
#
# Scale columns and target to mean 0 and sd 1, using the training rows only. Badly scaled inputs are the most common
# reason for a chain that does not mix: SGLD has one step size for all directions.

# %%
order = np.random.default_rng(0).permutation(len(rows))
train, test = order[: round(0.9 * len(rows))], order[round(0.9 * len(rows)) :]
centre, scale = rows[train].mean(0), rows[train].std(0)
standard = torch.as_tensor((rows - centre) / scale, dtype=torch.float32)
x_train, y_train = standard[train, :-1], standard[train, -1]
x_test, y_test = standard[test, :-1], standard[test, -1]

# %% [markdown]
# ## The model
#
# `"gaussian"` adds a latent `noise_scale` with a half-Cauchy prior, unless its value is given. `"fan_in"` gives a
# weight the standard deviation 1/sqrt(inputs), so that the size of a unit's output does not depend on the width of the
# layer.

# %%
net = nn.Sequential(nn.Linear(x_train.shape[1], 50), nn.ReLU(), nn.Linear(50, 1))
model = apd.BNN(net, likelihood="gaussian", prior_scale="fan_in", noise_prior="half_cauchy")

# %% [markdown]
# ## Sampling without choosing a step size
#
# `step_size="auto"` measures curvature and the noise of the mini-batches during warm-up, and uses the step size for
# which the draws are at most 10 % too wide. `warm_start` first optimises each chain. The *temperatures* say how wide
# the draws are. For a chain that has not yet explored the posterior they are biased, or have large errors, or both.

# %%
kernel = apd.SGLD(model, step_size="auto", batch_size=100, thinning=size(20, 4), warm_start=size(500, 20), seed=0)
mcmc = apd.MCMC(kernel, num_samples=size(200, 30), warmup_steps=size(300, 30), num_chains=4, disable_progbar=True)
mcmc.run(x_train, y_train)
chosen = mcmc.diagnostics()["step_size"]["chain 0"][-1]
print(f"step size {chosen:.3g}")
for reading in mcmc.diagnostics()["temperatures"]["chain 0"]:
    print(reading)

# %% [markdown]
# ## Distillation
#
# The noise scale is positive in every draw: the generator works in the unconstrained space, and the site's own
# transform maps it back. If the histogram has more than one peak, chains have settled in different modes. The generator
# has the same peaks, because it is trained on these chains.

# %%
posterior = apd.distill(mcmc, num_steps=size(400, 10), seed=0, progress=False)
chain, generated = mcmc.get_samples(), posterior.get_samples(1000, seed=0)
figure, ax = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
for draws, label in ((chain, "SGLD"), (generated, "APD")):
    ax.hist(scale[-1] * draws["noise_scale"].numpy(), bins=40, density=True, histtype="step", label=label)
ax.set(xlabel=f"sd of the noise ({unit})", ylabel="density")
ax.legend()
print(f"smallest noise scale drawn: {generated['noise_scale'].min():.3f}")

# %% [markdown]
# ## Prediction
#
# `outputs` gives each draw's mean and variance per datum. The variance of a new measurement is that of the noise
# (*aleatoric*) plus that of the networks' means (*epistemic*); more data would reduce only the second.


# %%
def predicted(draws):
    out = apd.outputs(model, draws, x_test)
    mean = out.mean_SN.mean(0)
    return mean, out.variance_SN.mean(0).sqrt(), out.mean_SN.std(0)


def interval_coverage(draws, level, seed=0):
    """Share of test data inside the central interval of what draws predict, noise included."""
    out = apd.outputs(model, draws, x_test)
    generator = torch.Generator().manual_seed(seed)
    y_SN = out.mean_SN + out.variance_SN.sqrt() * torch.randn(out.mean_SN.shape, generator=generator)
    low, high = y_SN.quantile(torch.tensor([0.5 - level / 2, 0.5 + level / 2]), dim=0)
    return float(((y_test >= low) & (y_test <= high)).float().mean())


for label, draws in (("SGLD", chain), ("APD", generated)):
    mean, noise_sd, model_sd = predicted(draws)
    rmse = scale[-1] * float((mean - y_test).square().mean().sqrt())
    log_score = apd.log_likelihood(model, draws, x_test, y_test).logsumexp(0) - np.log(len(draws["noise_scale"]))
    nll = float(-log_score.mean()) + np.log(scale[-1])
    covered = ", ".join(f"{level:.0%}: {interval_coverage(draws, level):.0%}" for level in (0.5, 0.8, 0.9))
    print(f"{label:5s} RMSE {rmse:.2f} {unit}, NLL {nll:.3f}; intervals and what they cover: {covered}")

# %% [markdown]
# This is one split of the data, so these are metrics of a hundred test rows: no more than a check. On twenty standard
# splits of the concrete data the published test RMSE of similar networks lies between 4.8 and 6.0 MPa (Lakshminarayanan
# et al. 2017). If intervals cover more than their nominal level, they are too wide.
#
# Where the model is uncertain, it should be wrong more often. The figure shows each test row with its interval of ±2
# sd:

# %%
mean, noise_sd, model_sd = predicted(generated)
by_size = mean.argsort()
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
place = torch.arange(len(mean))
centre_y = scale[-1] * mean[by_size] + centre[-1]
for sd, shade, label in (
    ((noise_sd.square() + model_sd.square()).sqrt(), 0.2, "±2 sd of a measurement"),
    (model_sd, 0.5, "±2 sd of the mean: the model's own doubt"),
):
    band = 2 * scale[-1] * sd[by_size]
    axes[0].fill_between(place, centre_y - band, centre_y + band, alpha=shade, color="tab:orange", lw=0, label=label)
axes[0].plot(place, scale[-1] * y_test[by_size] + centre[-1], ".", color="black", markersize=4, label="measured")
axes[0].set(xlabel="test rows, by prediction", ylabel=f"target ({unit})")
axes[0].legend(fontsize="small")
fidelity = apd.diagnostics.compare(mcmc, posterior, model, x_test, y_test, num_samples=size(100, 16), seed=0)
scores = fidelity.per_input
_ = plots.score_scatter(
    scores["chain"]["epistemic"].sqrt() * scale[-1],
    scores["generator"]["epistemic"].sqrt() * scale[-1],
    axes[1],
    score=f"sd of the mean ({unit})",
)

# %% [markdown]
# ## What was lost
#
# Read the first line before the table. If it says that the chain is too poorly mixed to tell, the generator may agree
# with the chain in every row, but the chain itself is not reliable: a network of this kind on these data needs longer
# chains than a tutorial has time for. The last lines say how much the chains differ from each other.

# %%
print(fidelity)

# %% [markdown]
# Next: [your own network and prior](09_your_own_network_and_prior.ipynb).
