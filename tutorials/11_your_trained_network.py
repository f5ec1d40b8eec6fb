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
# # 11. Your trained network, Bayesian in five lines
#
# A trained classifier always answers, also where the right answer is none of its classes. This tutorial takes a
# network as it was trained, makes its last layer Bayesian in five lines, then all of its layers by low-rank adapters,
# asks both about digits that the network never saw, and ships the result as one small file.

# %%
import os

import matplotlib.pyplot as plt
import torch
from torch import nn

import pyro_apd as apd

QUICK = os.environ.get("PYRO_APD_TUTORIAL_QUICK") == "1"  # a smoke test: everything runs, and little of it means much
torch.set_num_threads(1)  # for matrices this small, threads cost more than they give


def size(full, quick):
    return quick if QUICK else full


# %% [markdown]
# ## A trained network
#
# Somebody trained it on 200 images of the digits 0 to 7, in the usual way. It has never seen an 8 or a 9, and is sure
# of itself nevertheless.

# %%
torch.manual_seed(0)
data = apd.datasets.digits(seed=0)
is_known = data.y_train < 8
x_train, y_train = data.x_train[is_known][:200], data.y_train[is_known][:200]
known, unknown = data.x_test[data.y_test < 8], data.x_test[data.y_test >= 8]
y_known = data.y_test[data.y_test < 8]

net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8))
optimiser = torch.optim.Adam(net.parameters())
for _ in range(size(1500, 5)):
    batch = torch.randint(len(x_train), (100,))
    loss = nn.functional.cross_entropy(net(x_train[batch]), y_train[batch])
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
net.requires_grad_(False)


def report(title, on_known, on_unknown, scores):
    """Error and loss on known digits; unknown ones that are found with false alarms for 5 % of the known."""
    accuracy = (on_known.argmax(-1) == y_known).float().mean()
    loss = nn.functional.nll_loss(on_known.log(), y_known)
    found = {name: float((outside > inside.quantile(0.95)).float().mean()) for name, inside, outside in scores}
    found = ", ".join(f"{share:.2f} by {name}" for name, share in found.items())
    confidence = on_unknown.amax(-1).mean()
    print(f"{title}: accuracy {accuracy:.3f}, NLL {loss:.3f}; confidence on 8 and 9 {confidence:.2f}; found {found}")


probs = {name: net(x).softmax(-1) for name, x in (("known", known), ("unknown", unknown))}
entropies = [apd.uncertainty.predictive_entropy(values.unsqueeze(0)) for values in probs.values()]
report("network", *probs.values(), [("entropy", *entropies)])

# %% [markdown]
# ## Five lines
#
# `bayesian="last_layer"` puts priors on the last linear layer. The rest stays as it was trained, and is run once for
# each datum: a step costs what a linear model costs, whatever is before it.

# %%
bnn = apd.BNN(net, prior_scale=0.3, bayesian="last_layer")
kernel = apd.SGLD(bnn, "auto", batch_size=100, thinning=20, seed=0, init_strategy=bnn.init_to_network)
mcmc = apd.MCMC(kernel, num_samples=size(200, 20), warmup_steps=size(100, 5), disable_progbar=True)
mcmc.run(x_train, y_train)
posterior = apd.distill(mcmc, seed=0, progress=False)

# %% [markdown]
# ## What it says
#
# Entropy is how uncertain a prediction is. Mutual information is how much the networks of the posterior disagree
# about it: it is large where there were no data.

# %%
SCORES = ("mean_probability", "predictive_entropy", "mutual_information")


def compare(title, model, draws):
    inside, outside = (apd.reduce_outputs(model, draws, x, names=SCORES) for x in (known, unknown))
    scores = [(name.replace("_", " "), inside[name], outside[name]) for name in SCORES[1:]]
    report(title, inside["mean_probability"], outside["mean_probability"], scores)
    return outside


of_last_layer = compare("last layer", bnn, posterior.get_samples(200, seed=0))

# %% [markdown]
# The last layer is much less sure of what it does not know, and predicts the known digits as well as before. It does
# not find more of the unknown ones: all of its networks see the same features, and these were learned without an 8 or
# a 9.
#
# ## Adapters in all layers
#
# `"lora:4"` adds to each matrix of the network one of rank 4, and gives these priors. The trained network is the mean
# of the prior; `prior_scale` says by how much the output of a unit may change. Names choose layers: `"lora:4:0,2"`,
# or `["lora:4:0", "4"]` for an adapter in the first layer and all weights of the last one.

# %%
adapted = apd.BNN(net, prior_scale=1.0, bayesian="lora:4")
kernel = apd.SGLD(adapted, "auto", batch_size=100, thinning=20, seed=0, init_strategy=adapted.init_to_network)
of_adapters = apd.MCMC(kernel, num_samples=size(200, 20), warmup_steps=size(150, 5), disable_progbar=True)
of_adapters.run(x_train, y_train)
adapter_posterior = apd.distill(of_adapters, seed=0, byte_budget=30_000, progress=False)
compare("adapters, chain", adapted, of_adapters.get_samples())
outside = compare("adapters, generator", adapted, adapter_posterior.get_samples(200, seed=0))

# %% [markdown]
# These networks have features of their own: they predict known digits better than the trained network, and disagree
# about unknown ones. In 30,000 bytes the generator keeps most of that; by default it takes four times as many. Below,
# the first ten of these, with what each says.

# %%
figure, axes = plt.subplots(2, 5, figsize=(9, 4.6), layout="constrained")
for i, axis in enumerate(axes.flat):
    axis.imshow(unknown[i].reshape(8, 8), cmap="gray_r")
    axis.set_axis_off()
    said = [("network", probs["unknown"][i]), ("adapters", outside["mean_probability"][i])]
    axis.set_title("\n".join(f"{name}: {p.argmax()} ({p.max():.2f})" for name, p in said), fontsize=9)

# %% [markdown]
# ## One file
#
# The file holds the generator, and digests of the frozen weights: another trained network is refused.

# %%
adapter_posterior.save("adapters.safetensors")
shipped = apd.DistilledPosterior.load("adapters.safetensors")
answer = shipped.ensemble(50, net=adapted, outputs=("mean", "mutual_information"), seed=0)(unknown)
trained_bytes = 4 * sum(parameter.numel() for parameter in net.parameters())
print(f"{shipped.num_bytes:,} bytes beside {trained_bytes:,} of the network")
print(f"mean confidence on 8 and 9: {answer['mean'].amax(-1).mean():.2f}")
os.remove("adapters.safetensors")

# %% [markdown]
# Networks of several inputs, the features of a large network on disk, and other choices of the Bayesian part are in
# [how to](../docs/how_to.md#make-the-last-layer-of-a-trained-network-bayesian-or-an-adapter). Next: [a table with
# intervals](12_a_table_with_intervals.ipynb)
