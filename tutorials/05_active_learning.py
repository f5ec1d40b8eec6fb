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
# # 5. Active learning
#
# Labels are expensive. A model that knows its uncertainty can choose which datum to label next, and disagreement
# between the networks of a posterior is the natural measure (BALD, Houlsby et al. 2011). This tutorial first shows such
# choices in the plane. Then it labels digits from a pool in which half of the classes are rare, and shows why the data
# of a batch should not be chosen one by one. Active learning does not always win here, and this is part of the result.

# %%
import os
import warnings

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import make_moons
from torch import nn

import pyro_apd as apd
from pyro_apd import active_learning as al

QUICK = os.environ.get("PYRO_APD_TUTORIAL_QUICK") == "1"  # a smoke test: everything runs, and little of it means much
torch.set_num_threads(1)  # for matrices this small, threads cost more than they give
warnings.filterwarnings("ignore", message=".*warm-up.*")  # chains this short are a compromise; see the end


def size(full, quick):
    return quick if QUICK else full


# %% [markdown]
# ## In the plane
#
# The data are two half moons with four labelled points; three more are labelled in each round. `al.run` is the loop:
# fit a posterior, measure its accuracy on test data, choose what to label next, and start again from scratch.
# `posterior` says what to fit; `al.Chain` is SGLD on the data labelled so far. U grows with the number of labels, so
# the step size may be a function of that number.


# %%
def chain(rate, **settings):
    """A short chain, whose steps become smaller as labels become more."""
    return al.Chain(step_size=lambda n: min(0.02, rate / n), num_chains=2, options={"compile": False}, **settings)


x_moons, y_moons = (torch.as_tensor(part) for part in make_moons(300, noise=0.15, random_state=0))
x_moons = x_moons.float()
plane = apd.BNN(nn.Sequential(nn.Linear(2, 20), nn.ReLU(), nn.Linear(20, 2)), prior_scale=1.0)
in_plane = chain(0.4, num_samples=size(30, 5), warmup_steps=size(30, 5), thinning=size(10, 2))
pool, test = (x_moons[:200], y_moons[:200]), (x_moons[200:], y_moons[200:])
protocol = {"initial": 4, "batch_size": 3, "num_rounds": size(5, 2), "seed": 0, "progress": False}
runs = {
    rule: al.run(plane, *pool, *test, posterior=in_plane, acquisition=rule, **protocol) for rule in ("random", "bald")
}
print(runs["bald"])

# %% [markdown]
# The colour shows how much the networks disagree after all of these are labelled. The numbers are the order in which
# the points were chosen.

# %%
sides = torch.linspace(-1.8, 2.8, 50), torch.linspace(-1.4, 1.9, 50)
grid = torch.stack(torch.meshgrid(*sides, indexing="xy"), -1).flatten(0, 1)
columns_rows = [side.numpy() for side in sides]
figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True, sharey=True, layout="constrained")
for ax, (rule, history) in zip(axes, runs.items(), strict=True):
    index = torch.tensor(history.labelled)
    draws = in_plane(plane, x_moons[index], y_moons[index], 0, None)
    score = apd.uncertainty.mutual_information(apd.outputs(plane, draws, grid).probs_SNK)
    surface = score.reshape(50, 50).numpy()
    image = ax.pcolormesh(*columns_rows, surface, cmap="cividis", vmin=0, vmax=0.4, shading="gouraud")
    ax.scatter(*x_moons[:200].T, s=8, color="white", alpha=0.5, linewidths=0)
    for label, marker, colour in ((0, "o", "#CC79A7"), (1, "s", "#56B4E9")):
        of_class = index[y_moons[index] == label]
        ax.scatter(*x_moons[of_class].T, s=60, marker=marker, c=colour, edgecolors="black", label=f"class {label}")
    for order, n in enumerate(history.labelled[4:], start=1):
        ax.annotate(str(order), x_moons[n], xytext=(6, 4), textcoords="offset points", color="white", fontsize=9)
    ax.set_title(f"{rule}: {history.num_labels[-1]} labels, accuracy {history.accuracy[-1]:.2f}")
axes[0].legend(loc="lower left", fontsize="small")
_ = figure.colorbar(image, ax=axes, label="mutual information (nats)")

# %% [markdown]
# The points chosen by BALD lie at the edges of the moons, where the networks disagree most. But look at the numbers: 1,
# 2 and 3 are neighbours, and so are 4, 5 and 6, and the next three. Each of the three had the highest score
# *individually*, but after the first, the second and third added little information. Labels drawn at random are spread
# over the moons, and give the better accuracy from this start. With one label per round (`batch_size=1`) the rule works
# better, and takes three times as long.
#
# ## Digits, half of them rare
#
# The pool is unbalanced, as in practice: all images of the digits 0 to 4, and one in eight of those of 5 to 9. The test
# data are balanced. Labels drawn at random contain few rare digits. The first twenty labels are two of each digit; then
# there are 25 per round. There are four ways to choose them, one of which uses no posterior:

# %%
data = apd.datasets.digits(seed=0)
is_kept = data.y_train < 5
is_kept |= torch.arange(len(is_kept)) % 8 == 0
x_pool, y_pool = data.x_train[is_kept], data.y_train[is_kept]
print(f"{len(y_pool)} images, {(y_pool >= 5).float().mean():.0%} of them of rare digits")

model = apd.BNN(nn.Sequential(nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10)), "categorical", prior_scale=0.4)
digits = chain(0.22, num_samples=size(25, 5), warmup_steps=size(25, 5), thinning=size(10, 2))
one = al.Baseline(apd.baselines.map_estimate, {"num_steps": size(300, 5), "momentum": 0.9, "decay": True})
methods = {
    "SGLD, random": ("random", digits),
    "SGLD, BALD": ("bald", digits),
    "APD, BALD": ("bald", al.Distilled(digits, num_steps=size(20, 3), options={"rank": 20})),
    "one network, entropy": ("max_entropy", one),
}
protocol = {"initial": 20, "batch_size": 25, "num_rounds": size(5, 2), "progress": False}
histories = {
    name: [
        al.run(
            model,
            x_pool,
            y_pool,
            data.x_test,
            data.y_test,
            posterior=posterior,
            acquisition=rule,
            seed=seed,
            **protocol,
        )
        for seed in range(size(1 if name.startswith("APD") else 2, 1))
    ]
    for name, (rule, posterior) in methods.items()
}

# %% [markdown]
# Thin lines are runs, which differ in the first twenty labels and in the chains; thick lines are their means. The
# generator is distilled again in each round, which takes longest, so it has only one run: read it as an example.

# %%
styles = {"SGLD, random": ("#767676", "o"), "SGLD, BALD": ("#0072B2", "s"), "APD, BALD": ("#D55E00", "^"),
          "one network, entropy": ("#000000", "x")}  # fmt: skip
figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for name, several in histories.items():
    colour, marker = styles[name]
    labels = several[0].num_labels
    shares = [[(y_pool[h.labelled[:n]] >= 5).float().mean() for n in labels] for h in several]
    for ax, values in zip(axes, ([h.accuracy for h in several], shares), strict=True):
        values = torch.tensor(values)
        ax.plot(labels, values.T, color=colour, alpha=0.3, linewidth=0.8)
        ax.plot(labels, values.mean(0), marker=marker, color=colour, label=name)
axes[0].set(title="what it knows", xlabel="labels", ylabel="test accuracy of the average")
axes[1].set(title="what it asked for", xlabel="labels", ylabel="share of rare digits among labels")
for ax in axes:
    ax.grid(alpha=0.3)
_ = axes[0].legend(fontsize="small")

# %% [markdown]
# The right figure shows the mechanism. Labels drawn at random approach the pool's share of rare digits. The methods
# that choose keep a larger share of them, and have the better accuracy at the end. (It is no error that all fall at
# first: after a start with equal shares many labels of common digits follow, and the test data are balanced.)
#
# There is also an unfavourable result for the posterior: one network, trained as usual, which chooses by its own
# entropy, is best here, at a fraction of the cost. With a hundred labels and chains this short the posterior is wide
# and its average cautious, and the disagreement by which BALD ranks is a noisy estimate from few draws.

# %%
for name, several in histories.items():
    last = torch.tensor([h.accuracy[-1] for h in several])
    mean = torch.tensor([h.mean_accuracy for h in several])
    print(f"{name:22s} last accuracy {last.mean():.3f}, mean over rounds {mean.mean():.3f}, of {len(several)} runs")

# %% [markdown]
# Two runs are only two runs: thin lines of different colours cross, and a fair comparison needs many more.
#
# ## A batch at a time
#
# In the plane, the three points of a round were neighbours. *BatchBALD* (Kirsch et al. 2019) uses the *joint*
# information of the labels of a batch, so that a second image similar to the first adds little. Below are the next
# choices of both, from the chain on the first labels:

# %%
index = torch.tensor(histories["SGLD, BALD"][0].labelled[:45])
draws = digits(model, x_pool[index], y_pool[index], 0, None)
free = torch.tensor(sorted(set(range(len(y_pool))) - set(index.tolist())))[::3]
probs_SNK = apd.outputs(model, draws, x_pool[free]).probs_SNK
together, information = al.batch_bald(probs_SNK, 10, max_configurations=size(500, 50), seed=0)
alone = al.select("bald", probs_SNK, 10)
figure, axes = plt.subplots(2, 10, figsize=(11, 2.7), layout="constrained")
for row, (name, chosen) in zip(axes, {"BALD": alone, "BatchBALD": together}.items(), strict=True):
    for ax, n in zip(row, free[chosen].tolist(), strict=True):
        ax.imshow(x_pool[n].reshape(8, 8).numpy(), cmap="gray_r")
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"{y_pool[n]}", fontsize=9)
    row[0].set_ylabel(name, rotation=0, ha="right", va="center")
_ = figure.suptitle("Ten questions, the most wanted first, with the true digit")

# %% [markdown]
# BALD chooses the same few digits again and again. BatchBALD has more kinds of digits among its ten. It also repeats
# some, because two images of one digit can each be informative. It is more expensive, and considers a third of the pool
# here; in the loop it is `acquisition="batch_bald"`, with `pool_subset` for this.
#
# ## What to remember
#
# * Compare with random labels, and with the entropy of a single network. Both can be as good, and both are cheap.
# * Use several seeds, or make no claim: the start has a large effect on the result.
# * Choose few labels per round, or use `"batch_bald"`.
# * The posterior does not have to be perfect to choose well, but chains as short as these are a compromise with a
#   tutorial's time. If their warm-up is too short, the library warns; the warnings are switched off above.
# * `history_path=` stores a run on disk, so that it continues after an interruption.
#
# Next: [adversarial examples, and why weak attacks are misleading](06_adversarial_examples.ipynb).
