# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Draws the picture of the pinned part and the null part of a layer's weights: ``python docs/site/split.py``."""

from pathlib import Path

import torch
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import pyro_apd as apd

TARGET = Path(__file__).parents[1] / "images" / "split.png"
PRIOR_SD = 0.4
# A layer with as few inputs as this one is pinned in all directions; the picture divides it where it would be divided.
NUM_PINNED = 40
SHOWN = (0, 1, 2, 8, 20, 45, 55, 63)
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"


def first_layer_draws(x: Tensor, y: Tensor) -> Tensor:
    """Weights ``(S, O, I)`` of the first layer of a 64-50-10 network, in draws of one chain."""
    model = apd.BNN(nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10)), prior_scale=PRIOR_SD)
    kernel = apd.SGLD(model, step_size=1e-4, batch_size=100, thinning=60, seed=0)
    mcmc = apd.MCMC(kernel, num_samples=400, warmup_steps=200, disable_progbar=True)
    mcmc.run(x, y)
    return mcmc.get_samples()["net.0.weight"]


def draw(directions_IK: Tensor, inputs_K: Tensor, weights_K: Tensor, effect_K: Tensor) -> Figure:
    """The picture.

    :param directions_IK: principal directions of the inputs, largest first.
    :param inputs_K: root mean square of the inputs along each.
    :param weights_K: standard deviation of the weights along each, over draws.
    :param effect_K: standard deviation of the layer's outputs that these weights cause.
    """
    figure = Figure(figsize=(9.5, 7.4), layout="constrained")
    images, lines, bars = figure.subfigures(3, 1, height_ratios=(1.35, 2.0, 2.0))
    images.suptitle("Directions of the inputs, as images: digits vary along the first ones, and hardly along the last")
    for ax, k in zip(images.subplots(1, len(SHOWN)), SHOWN, strict=True):
        image_HW = directions_IK[:, k].reshape(8, 8)
        largest = float(image_HW.abs().max())
        ax.imshow(image_HW, cmap="PuOr", norm=colors.Normalize(-largest, largest))
        ax.set_title(f"direction {k + 1}", fontsize=9, color=BLUE if k < NUM_PINNED else ORANGE)
        ax.set(xticks=[], yticks=[])
    number_K = torch.arange(1, len(inputs_K) + 1)
    lines.suptitle("The weights spread along all of them, about as much as in the prior ...")
    ax = lines.subplots()
    ax.plot(number_K, inputs_K, "-", color=GREY, label="size of the inputs along the direction")
    ax.plot(number_K, weights_K, "o", color="black", markersize=4, label="spread of the weights along it, over draws")
    ax.axhline(PRIOR_SD, color="black", linewidth=1, linestyle=":", label="spread of the weights in the prior")
    ax.set(yscale="log", ylim=(0.005, 12), ylabel="size, spread")
    ax.legend(loc="lower left", fontsize=9)
    _shade(ax, 6.0, ("pinned part: kept finely", "null part: kept coarsely"))
    bars.suptitle("... but nearly all spread of the layer's outputs comes from the first ones")
    ax = bars.subplots()
    ax.bar(number_K, effect_K, color=[BLUE if k < NUM_PINNED else ORANGE for k in range(len(effect_K))])
    ax.set(xlabel="direction of the layer's inputs, the largest first", ylabel="spread of the outputs")
    share = float(effect_K[:NUM_PINNED].square().sum() / effect_K.square().sum())
    words = (f"{share:.1%} of the variance of the outputs", f"{1 - share:.1%}")
    _shade(ax, 0.7 * float(effect_K.max()), words)
    return figure


def _shade(ax: Axes, height: float, words: tuple[str, str]) -> None:
    """Colours both parts, with words over each."""
    last = 64.5
    ax.set_xlim(0.5, last)
    parts = ((0.5, NUM_PINNED + 0.5, BLUE), (NUM_PINNED + 0.5, last, ORANGE))
    for (start, stop, colour), text in zip(parts, words, strict=True):
        ax.axvspan(start, stop, color=colour, alpha=0.08, linewidth=0)
        ax.text((start + stop) / 2, height, text, ha="center", va="center", color=colour)


if __name__ == "__main__":
    torch.set_num_threads(1)
    data = apd.datasets.digits(seed=0)
    values_I, vectors_IK = torch.linalg.eigh(data.x_train.mT @ data.x_train / len(data.x_train))
    directions_IK, inputs_K = vectors_IK.flip(1), values_I.flip(0).clamp_min(1e-12).sqrt()
    along_SOK = first_layer_draws(data.x_train, data.y_train) @ directions_IK
    weights_K = along_SOK.var(0).mean(0).sqrt()
    draw(directions_IK, inputs_K, weights_K, inputs_K * weights_K).savefig(TARGET, dpi=110)
    print(f"{TARGET.name}: {TARGET.stat().st_size:,} bytes")
