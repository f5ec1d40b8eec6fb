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
# # 6. Adversarial examples, and why weak attacks flatter you
#
# A change of an image that a person hardly sees can change what a network says. It is tempting to show that a posterior
# notices: attack it, look at its uncertainty, report that the attacks stand out. This tutorial does so, gets a fine
# figure, and then takes it apart, because the attack that gave it was one that knew next to nothing of what it
# attacked.

# %%
import os

import matplotlib.pyplot as plt
import torch
from torch import nn

import pyro_apd as apd
from pyro_apd.adversarial import Attack, attack, evaluate
from pyro_apd.diagnostics import plots

QUICK = os.environ.get("PYRO_APD_TUTORIAL_QUICK") == "1"  # a smoke test: everything runs, and little of it means much
torch.set_num_threads(1)  # for matrices this small, threads cost more than they give


def size(full, quick):
    return quick if QUICK else full


# %% [markdown]
# ## What is attacked
#
# Digits, as in [tutorial 2](02_digits_end_to_end.ipynb): a chain (**SGLD**), the generator distilled from it (**APD**),
# and **one network** trained as usual. Pixels are in [-1, 1], which the attacks have to be told: sizes of changes are
# in the units of the inputs.

# %%
data = apd.datasets.digits(seed=0)
x, y, bounds = data.x_test[: size(360, 40)], data.y_test[: size(360, 40)], (-1.0, 1.0)
model = apd.BNN(nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10)), "categorical", prior_scale=0.4)
kernel = apd.SGLD(model, step_size=1e-4, batch_size=100, thinning=20, seed=0)
mcmc = apd.MCMC(kernel, num_samples=size(100, 10), warmup_steps=size(150, 10), num_chains=4, disable_progbar=True)
mcmc.run(data.x_train, data.y_train)
posteriors = {
    "SGLD": mcmc.get_samples(),
    "APD": apd.distill(mcmc, num_steps=size(300, 10), seed=0, progress=False),
    "one network": apd.baselines.map_estimate(
        model, data.x_train, data.y_train, num_steps=size(2000, 20), batch_size=100, momentum=0.9, decay=True,
        seed=0, progress=False,
    ),
}  # fmt: skip

# %% [markdown]
# ## Attacks, from weak to strong
#
# An attack goes up the gradient of the loss, and an `Attack` says two things about it. *Method*: `"fgsm"` takes one
# step; `"fgsm_minimal"` the smallest one that is enough; `"pgd"` takes many, and stays within `epsilon` of the image.
# *Through*: whose gradient. A predictor that averages many networks can be attacked through `"one"` of them, which is
# cheap and knows nothing of the others; through the `"mean"` of some; or through their `"expectation"`, with networks
# drawn anew at each step, as the predictor itself draws them. The last is what somebody would do who knows what he is
# up against (Athalye, Carlini and Wagner 2018).

# %%
epsilon = 0.3
steps = size(40, 4)
attacks = {
    "FGSM, one network": Attack("fgsm", epsilon, "one"),
    "FGSM minimal, one network": Attack("fgsm_minimal", epsilon, "one", num_steps=size(20, 4)),
    "PGD, one network": Attack("pgd", epsilon, "one", num_steps=steps),
    "FGSM, expectation": Attack("fgsm", epsilon, "expectation"),
    "PGD, expectation": Attack("pgd", epsilon, "expectation", num_steps=steps),
}
attacked = {
    name: attack(model, posteriors["APD"], x, y, how, bounds=bounds, seed=1).x for name, how in attacks.items()
}

networks = posteriors["APD"].get_samples(100, seed=2)  # of others than the attacks have drawn
seen = {"clean": x, **attacked}
probs = {name: apd.outputs(model, networks, images).probs_SNK for name, images in seen.items()}

figure, axes = plt.subplots(4, len(seen), figsize=(11, 8.2), layout="constrained")
for row, n in zip(axes, range(4), strict=True):
    for ax, (name, images) in zip(row, seen.items(), strict=True):
        mean_K = probs[name].mean(0)[n]
        score = apd.uncertainty.mutual_information(probs[name][:, n : n + 1])[0]
        ax.imshow(images[n].reshape(8, 8), cmap="gray_r", vmin=-1, vmax=1)
        ax.set_xlabel(f"{mean_K.argmax()} ({mean_K.max():.0%})\nMI {score:.2f}")
        ax.set(xticks=[], yticks=[])
    row[0].set_ylabel(f"is {y[n]}", rotation=0, ha="right", va="center")
for ax, name in zip(axes[0], seen, strict=True):
    ax.set_title(name.replace(", ", ",\n").replace(" minimal", "\nminimal"), fontsize=9)
_ = figure.suptitle("What 100 networks of the generator say, how surely, and how far they disagree")

# %% [markdown]
# ## The flattering figure
#
# Does uncertainty give the attacks away? Let us say the mutual information, as in
# [tutorial 4](04_out_of_distribution.ipynb), and the attack that most papers of 2018 took: one step, through one
# network.

# %%
common = {"bounds": bounds, "num_draws": 100, "seed": 0, "scores": ("predictive_entropy", "mutual_information")}
weak = {"FGSM minimal, one network": attacks["FGSM minimal, one network"]}
flattering = evaluate(model, posteriors["APD"], x, y, weak, **common)
print(flattering)

# %% [markdown]
# TEXT

# %%
found = {name: evaluate(model, posterior, x, y, attacks, **common) for name, posterior in posteriors.items()}
print(found["APD"])

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True, layout="constrained")
styles = {"SGLD": ("#0072B2", "o"), "APD": ("#D55E00", "^"), "one network": ("#000000", "x")}
place = torch.arange(len(attacks))
for name, result in found.items():
    colour, marker = styles[name]
    axes[0].plot([row.robust_accuracy for row in result.rows], place, marker, color=colour, label=name)
    if name != "one network":
        auroc = [row.auroc_successes["mutual_information"] for row in result.rows]
        axes[1].plot(auroc, place, marker, color=colour, label=name)
axes[0].set(title="what is left of the accuracy", xlabel="accuracy under attack", xlim=(0, 1))
axes[1].set(title="does disagreement give it away?", xlabel="AUROC by MI, attacks that succeeded", xlim=(0, 1))
axes[1].axvline(0.5, color="#767676", linestyle="--", linewidth=1, label="guessing")
axes[0].set(yticks=place, yticklabels=list(attacks))
for ax in axes:
    ax.grid(axis="x", alpha=0.3)
    ax.legend(fontsize="small")
axes[0].invert_yaxis()

# %%
scores = {name: apd.uncertainty.mutual_information(value) for name, value in probs.items()}
wrong = {name: probs[name].mean(0).argmax(-1) != y for name in attacked}
shown = {name: scores[name][wrong[name]] for name in ("FGSM minimal, one network", "PGD, one network", "PGD, expectation")}
figure, ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
_ = plots.score_histograms(scores["clean"], shown, ax, score="mutual information (nats)", upper=1.2, bins=24)
ax.set_ylim(0, 6)

# %%
sizes = [0.05, 0.1, 0.2, 0.3, 0.4, 0.6][:: size(1, 3)]
curves = {
    "random noise": None,
    "FGSM, one network": {"method": "fgsm", "through": "one"},
    "PGD, one network": {"method": "pgd", "through": "one", "num_steps": steps},
    "PGD, expectation": {"method": "pgd", "through": "expectation", "num_steps": steps},
}
noise = 2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) - 1


def accuracy_left(name, images):
    return apd.metrics.accuracy(apd.outputs(model, shown_networks[name], images).probs_SNK.mean(0), y)


shown_networks = {"APD": networks, "one network": posteriors["one network"]}
figure, ax = plt.subplots(figsize=(6.4, 4), layout="constrained")
for (name, settings), colour, marker in zip(curves.items(), ("#767676", "#0072B2", "#009E73", "#D55E00"), "vosD", strict=True):
    left = [
        accuracy_left("APD", (x + eps * noise.sign()).clamp(*bounds) if settings is None else
        attack(model, posteriors["APD"], x, y, Attack(epsilon=eps, **settings), bounds=bounds, seed=1).x)
        for eps in sizes
    ]
    ax.plot([0, *sizes], [accuracy_left("APD", x), *left], marker=marker, color=colour, label=name)
ax.set(xlabel="epsilon: largest change of a pixel, of a range of 2", ylabel="accuracy of the average", ylim=(0, 1.02))
ax.legend()

# %%
transfer = evaluate(
    model, posteriors["APD"], x, y, {"PGD on another network": attacks["PGD, one network"]},
    source=posteriors["one network"], **common,
)  # fmt: skip
print(transfer)

# %%
for n in (1, 5, 20, 40, 80)[:: size(1, 3)]:
    made = attack(model, posteriors["APD"], x, y, Attack("pgd", epsilon, "expectation", num_steps=n), bounds=bounds, seed=1)
    print(f"{n:3d} steps: accuracy {accuracy_left('APD', made.x):.3f}")
