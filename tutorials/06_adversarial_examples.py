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
# # 6. Adversarial examples, and why weak attacks are misleading
#
# A change of an image that a person can hardly see can change the output of a network. It is tempting to show that a
# posterior detects this: attack it, look at its uncertainty, and report that the attacks have high uncertainty. This
# tutorial does so and gets a good result. Then it shows why the result is wrong: the attack knew almost nothing about
# the predictor that it attacked.

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
# Digits, as in [tutorial 2](02_digits_end_to_end.ipynb): a chain (**SGLD**), the generator distilled from it (labelled
# **APD**), and **one network** trained as usual. Pixels are in [-1, 1]. The attacks must be told this, because sizes of
# changes are in the units of the inputs.

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
# An attack follows the gradient of the loss upwards. An `Attack` has two settings. *Method*: `"fgsm"` takes one step;
# `"fgsm_minimal"` takes the smallest single step that succeeds; `"pgd"` takes many steps, and stays within `epsilon` of
# the image. *Through*: which gradient. A predictor that averages many networks can be attacked through `"one"` of them,
# which is cheap and ignores the others; through the `"mean"` of some; or through their `"expectation"`, with networks
# drawn again at each step, as the predictor itself draws them. An attacker who knows the predictor would use the last
# one (Athalye, Carlini and Wagner 2018).

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
made = {name: attack(model, posteriors["APD"], x, y, how, bounds=bounds, seed=1).x for name, how in attacks.items()}

networks = posteriors["APD"].get_samples(100, seed=2)  # others than the attacks have drawn
seen = {"clean": x, **made}
probs = {name: apd.outputs(model, networks, images).probs_SNK for name, images in seen.items()}

figure, axes = plt.subplots(4, len(seen), figsize=(11, 8.2), layout="constrained")
for row, n in zip(axes, range(4), strict=True):
    for ax, (name, images) in zip(row, seen.items(), strict=True):
        mean_K = probs[name].mean(0)[n]
        score = apd.uncertainty.mutual_information(probs[name][:, n : n + 1])[0]
        ax.imshow(images[n].reshape(8, 8).numpy(), cmap="gray_r", vmin=-1, vmax=1)
        ax.set_xlabel(f"{mean_K.argmax()} ({mean_K.max():.0%})\nMI {score:.2f}")
        ax.set(xticks=[], yticks=[])
    row[0].set_ylabel(f"is {y[n]}", rotation=0, ha="right", va="center")
for ax, name in zip(axes[0], seen, strict=True):
    ax.set_title(name.replace(", ", ",\n").replace(" minimal", "\nminimal"), fontsize=9)
_ = figure.suptitle("What 100 networks of the generator say, how surely, and how far they disagree")

# %% [markdown]
# To a person, each row is the same digit six times, on a noisy background. Minimal FGSM stops as soon as the one
# network that it uses is wrong, and there most other networks still give the right answer. PGD through the expectation
# most often makes the average wrong.
#
# ## The misleading result
#
# Does uncertainty reveal the attacks? First by mutual information, as in [tutorial 4](04_out_of_distribution.ipynb),
# and against the weakest attack: the smallest step, through one network.

# %%
common = {"bounds": bounds, "num_draws": 100, "seed": 0, "scores": ("mutual_information",)}
cheapest = {name: attacks[name] for name in ("FGSM minimal, one network",)}
print(evaluate(model, posteriors["APD"], x, y, cheapest, **common))

# %% [markdown]
# *Robust* is the accuracy under attack, which is hardly below that without. *Successes* are images whose prediction was
# right and is now wrong. AUROC is the probability that one of them has more mutual information than a clean image with
# a right prediction. Nearly all the accuracy is left, and nearly all successes are detected: this could be the
# conclusion of a paper. But it is based on very few successes. The attack deceived the network for which it was made;
# the predictor is a different one.
#
# ## The same with stronger attacks

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
    if name != "one network":  # which has nobody to disagree with
        auroc = [row.auroc_successes["mutual_information"] for row in result.rows]
        axes[1].plot(auroc, place, marker, color=colour, label=name)
axes[0].set(title="what is left of the accuracy", xlabel="accuracy under attack", xlim=(0, 1))
axes[1].set(title="does disagreement give it away?", xlabel="AUROC by MI, attacks that succeeded", xlim=(0.4, 1))
axes[1].axvline(0.5, color="#767676", linestyle="--", linewidth=1, label="guessing")
axes[0].set(yticks=place, yticklabels=list(attacks))
for ax in axes:
    ax.grid(axis="x", alpha=0.3)
    ax.legend(fontsize="small")
axes[0].invert_yaxis()

# %% [markdown]
# The two attacks through the expectation, at the bottom, leave much less accuracy than the three through one network.
# Under the strongest, chain and generator keep *less* of their accuracy than one ordinary network: the average has a
# smooth gradient in the right direction, and an attacker needs nothing else. Detection is also worse, although at this
# size it does not fail completely. Note also that PGD is no better than FGSM when both use one network: more steps in
# the wrong direction do not make a stronger attack.
#
# Chain and generator are nearly the same, here as elsewhere: a generator has the properties of its chain, including its
# weaknesses.
#
# ## Against the size of the change
#
# A result at one epsilon depends on the choice of epsilon. So the figure shows the whole range, for the generator, with
# random noise of the same size for comparison:

# %%
sizes = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6][:: size(1, 3)]
kinds = {
    "FGSM, one network": {"method": "fgsm", "through": "one"},
    "PGD, one network": {"method": "pgd", "through": "one", "num_steps": steps},
    "PGD, expectation": {"method": "pgd", "through": "expectation", "num_steps": steps},
}
colours = {"FGSM, one network": ("#0072B2", "o"), "PGD, one network": ("#009E73", "s"),
           "PGD, expectation": ("#D55E00", "D")}  # fmt: skip


def accuracy(images):
    """Of the averaged prediction."""
    return apd.metrics.accuracy(apd.outputs(model, networks, images).probs_SNK.mean(0), y)


sign = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(3)) * 2.0 - 1
noisy = [accuracy((x + eps * sign).clamp(*bounds)) for eps in sizes]
figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
axes[0].plot([0, *sizes], [accuracy(x), *noisy], "v-", color="#767676", label="random noise")
for name, settings in kinds.items():
    by_size = {str(eps): Attack(epsilon=eps, **settings) for eps in sizes}
    rows = evaluate(model, posteriors["APD"], x, y, by_size, **common).rows
    colour, marker = colours[name]
    left = [accuracy(x), *(row.robust_accuracy for row in rows)]
    axes[0].plot([0, *sizes], left, marker=marker, color=colour, label=name)
    # An AUROC of a handful of successes says nothing.
    told = [row.auroc_successes["mutual_information"] if row.num_successes >= 10 else torch.nan for row in rows]
    axes[1].plot(sizes, told, marker=marker, color=colour, label=name)
axes[1].axhline(0.5, color="#767676", linestyle="--", linewidth=1, label="guessing")
axes[0].set(title="what is left of the accuracy", ylabel="accuracy under attack", ylim=(0, 1.02))
axes[1].set(title="does disagreement give it away?", ylabel="AUROC by MI, attacks that succeeded", ylim=(0, 1.02))
for ax in axes:
    ax.set(xlabel="epsilon: largest change of a pixel, of a range of 2", xlim=(0, sizes[-1] + 0.02))
    ax.grid(alpha=0.3)
    ax.legend(loc="lower left", fontsize="small")

# %% [markdown]
# By the two attacks through one network, the conclusion would be: disagreement reveals the attack at any size. By PGD
# through the expectation the conclusion is: the larger the change, the less it is revealed, and where no accuracy is
# left, detection is much closer to guessing. Random noise, of the same size in every pixel, has almost no effect, so
# robustness to it shows nothing.
#
# What causes the difference? The figure compares the images that deceived the generator with the clean images that were
# classified correctly:

# %%
scores = {name: apd.uncertainty.mutual_information(value) for name, value in probs.items()}
is_right = probs["clean"].mean(0).argmax(-1) == y
fooled = {name: is_right & (probs[name].mean(0).argmax(-1) != y) for name in made}
shown = {name: scores[name][fooled[name]] for name in ("PGD, one network", "PGD, expectation")}
figure, ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
_ = plots.score_histograms(
    scores["clean"][is_right], shown, ax, score="mutual information (nats)", upper=1.0, bins=20,
    title=f"Images that fooled the generator, at epsilon {epsilon}",
)  # fmt: skip
_ = ax.set_ylim(0, 5)

# %% [markdown]
# Disagreement is a side effect of the weak attack: it moves an image to where one network is wrong and others are not.
# An attack along the gradient of the average searches for images where *most* networks are wrong, and finds some where
# they even agree.
#
# ## Is this the strongest attack?
#
# This cannot be proved, but there are signs that an attack is *not* the strongest (Carlini et al. 2019). At a large
# epsilon the accuracy must go to zero, as it does above. More steps should not help any more:

# %%
for num_steps in (1, 5, 20, 40, 80)[:: size(1, 3)]:
    how = Attack("pgd", epsilon, "expectation", num_steps=num_steps)
    images = attack(model, posteriors["APD"], x, y, how, bounds=bounds, seed=1).x
    print(f"{num_steps:3d} steps: accuracy {accuracy(images):.3f}")

# %% [markdown]
# And an attack made on another model, without knowledge of this one, should have less effect than one made on this one.
# Here it is made on the network that was trained as usual, and applied to the generator:

# %%
elsewhere = {"PGD, on the one network": attacks["PGD, one network"]}
print(evaluate(model, posteriors["APD"], x, y, elsewhere, source=posteriors["one network"], **common))

# %% [markdown]
# It has less effect than PGD through the expectation, but *more* than PGD through one network of the posterior itself.
# This is the sign: the attack through one network is weaker than an attack made on a different model. A single draw of
# a posterior is a noisy network, and its gradient points in a wrong direction.
#
# ## What to report
#
# * Attacks through the expectation, or the mean, of as many networks as the predictor averages, with enough steps.
# * The accuracy under attack beside each AUROC, and the AUROC of the attacks that *succeeded*: over all attacks it also
#   counts images that were not misclassified.
# * Curves over epsilon, up to where no accuracy is left, and random noise of the same size.
# * One ordinary network for comparison. Being Bayesian alone is no defence (Feng et al. 2024).
#
# Moreover, the attacker here does not try to avoid detection. An attack that also minimises the mutual information may
# be stronger. Next: [regression with learned noise](07_regression_with_learned_noise.ipynb).
