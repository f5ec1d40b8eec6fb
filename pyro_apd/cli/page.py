# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The command ``pyro-apd page``: a page for the browser from a file."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_apd.cli.report import image_size, load_model
from pyro_apd.export.example import network_inputs
from pyro_apd.page import PageInputs, write_page
from pyro_apd.page.runtime import PACKAGE, VERSION
from pyro_apd.posterior.posterior import DistilledPosterior

# Rows of the data that are buttons in the page.
_NUM_EXAMPLES = 10


def add_parser(commands: Any) -> None:
    """Adds ``page`` to the subcommands of a parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "page",
        help="a page for the browser, in which the networks of a posterior answer",
        description="Writes a folder of static files, in which a person draws an image or moves sliders of a table's "
        "features, and sees the prediction, its uncertainty, and how networks disagree. Needs the extra `onnx`.",
    )
    parser.add_argument("posterior", type=Path, metavar="POSTERIOR.safetensors", help="the distilled posterior")
    parser.add_argument(
        "--model", metavar="MODULE:NAME", required=True, help="the apd.BNN or network, or what makes it"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DATA.npz",
        help="arrays x; y, feature_names, class_names and labels of examples (all optional)",
    )
    parser.add_argument(
        "--image", metavar="ROWSxCOLUMNS", help="draw the inputs, of one channel; else there are sliders"
    )
    parser.add_argument("--out", type=Path, default=Path("page"), help="folder to write (%(default)s)")
    parser.add_argument("--title", default="A distilled posterior", help="its heading")
    parser.add_argument("--num-draws", type=int, default=50, help="networks that answer (%(default)s)")
    parser.add_argument("--link", choices=("softmax", "identity"), help="of the outputs of a plain network")
    parser.add_argument(
        "--runtime", type=Path, metavar="PATH", help=f"what `npm pack {PACKAGE}@{VERSION}` fetches, or a folder"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the networks (%(default)s)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    net = load_model(arguments.model)
    if inspect.isfunction(net):  # a Pyro model that is a function has no network to export
        net = net()
    if not isinstance(net, nn.Module):
        raise ValueError(
            f"--model {arguments.model} is a {type(net).__name__}; it must be an apd.BNN or a torch network."
        )
    arrays = {} if arguments.data is None else load_arrays(arguments.data)
    path = write_page(
        DistilledPosterior.load(arguments.posterior),
        page_inputs(net, arrays, arguments.image),
        arguments.out,
        net=net,
        classes=list(map(str, arrays["class_names"])) if "class_names" in arrays else None,
        title=arguments.title,
        num_draws=arguments.num_draws,
        link=arguments.link,
        runtime_path=arguments.runtime,
        seed=arguments.seed,
    )
    print(path)
    return 0


def load_arrays(path: Path) -> dict[str, Any]:
    """Arrays of an ``.npz`` file.

    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it is no such file, or lacks ``x``.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--data {path} is not an .npz file of plain arrays ({error}); numpy.savez writes one."
        ) from error
    if "x" not in arrays or arrays["x"].ndim < 2 or len(arrays["x"]) == 0:
        raise ValueError(f"--data {path} holds {sorted(arrays)}; it must hold the inputs as x, with a row per datum.")
    return arrays


def page_inputs(net: nn.Module, arrays: dict[str, Any], image: str | None) -> PageInputs:
    """Inputs of the page for a network and its data.

    :raises ValueError: if image or names do not fit.
    """
    x: Tensor | None = torch.tensor(arrays["x"]).float() if "x" in arrays else None
    labels = arrays.get("labels", arrays.get("y", range(1, _NUM_EXAMPLES + 1)))[:_NUM_EXAMPLES]
    labels = [str(label) for label in labels]
    inner = getattr(net, "net", net)
    shape = tuple(x.shape[1:] if x is not None else network_inputs(inner, None)["x"].shape[1:])
    if image is None:
        return PageInputs.sliders(shape, x, list(arrays.get("feature_names", ())), labels)
    rows, columns = image_size(image, num_sizes=(2,))
    return PageInputs.drawing(shape, (rows, columns), x, labels)
