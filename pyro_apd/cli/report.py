# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The command ``pyro-apd report``: a report from files."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_apd.posterior.posterior import DistilledPosterior

_OOD = "ood_"


def add_parser(commands: Any) -> None:
    """Adds ``report`` to the subcommands of a parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "report",
        help="one HTML page about a distilled posterior, from files",
        description="Compares the draws of a chain with a distilled posterior and writes one HTML page. The chain is "
        "a file of save_netcdf(to_arviz(mcmc), 'chains.nc'). Without --model and --data only weights are compared, "
        "which are not identified.",
    )
    parser.add_argument("chain", type=Path, metavar="CHAIN.nc", help="the chain's draws")
    parser.add_argument("posterior", type=Path, metavar="POSTERIOR.safetensors", help="the distilled posterior")
    parser.add_argument(
        "--model",
        metavar="MODULE:CALLABLE",
        help="the Pyro model, or a class to make it of; with () at its end, a function that returns it",
    )
    parser.add_argument(
        "--data", type=Path, metavar="DATA.npz", help=f"arrays x, y (optional), {_OOD}NAME (optional, any number)"
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write (%(default)s)")
    parser.add_argument("--title", default="A distilled posterior against its chain", help="its heading")
    parser.add_argument("--num-samples", type=int, default=100, help="draws of chain and of generator (%(default)s)")
    parser.add_argument(
        "--image", metavar="ROWSxCOLUMNS", help="inputs are images in flat rows, or CHANNELSxROWSxCOLUMNS: show some"
    )
    parser.add_argument("--seed", type=int, default=0, help="makes the page reproducible (%(default)s)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from pyro_apd.diagnostics.arviz_export.stored import StoredRun
    from pyro_apd.diagnostics.html.report import report

    if arguments.data is not None and arguments.model is None:
        raise ValueError("--data needs --model MODULE:CALLABLE, the model that is called with it.")
    if arguments.model is not None and arguments.data is None:
        raise ValueError("--model needs --data DATA.npz with the inputs x to predict on.")
    model = None if arguments.model is None else load_model(arguments.model)
    x, y, ood = (None, None, None) if arguments.data is None else load_data(arguments.data)
    path = report(
        *(StoredRun(arguments.chain), DistilledPosterior.load(arguments.posterior), model, x, y),
        ood=ood,
        path=arguments.out,
        title=arguments.title,
        num_samples=arguments.num_samples,
        seed=arguments.seed,
        image_shape=None if arguments.image is None else image_size(arguments.image),
    )
    print(path)
    return 0


def image_size(text: str, num_sizes: Sequence[int] = (2, 3)) -> tuple[int, ...]:
    """Sizes of ``"8x8"`` or ``"3x8x8"``.

    :param num_sizes: how many there may be.
    :raises ValueError: if it is not like that.
    """
    sizes = text.split("x")
    if len(sizes) not in num_sizes or not all(re.fullmatch("[1-9][0-9]*", size) for size in sizes):
        channels = " or CHANNELSxROWSxCOLUMNS" if len(num_sizes) > 1 else ""
        raise ValueError(f"--image must be ROWSxCOLUMNS{channels}, such as 8x8; got '{text}'.")
    return tuple(map(int, sizes))


def load_model(name: str) -> Callable[..., Any]:
    """The object that ``module:attribute`` names; an instance of it, if it is a class. The current folder counts.

    :raises ValueError: if there is no such module or attribute, or it cannot be called.
    """
    module_name, _, attribute = name.partition(":")
    attribute, is_called = attribute.removesuffix("()"), attribute.endswith("()")
    if not module_name or not attribute:
        raise ValueError(f"--model must be MODULE:CALLABLE, such as my_package.models:bnn; got '{name}'.")
    sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--model {name}: {error}. Give a module that Python can import, and a name in it.") from error
    finally:
        sys.path.remove("")
    if inspect.isclass(found) or is_called:
        found = found()
    if not callable(found):
        raise ValueError(
            f"--model {name} is a {type(found).__name__}, which cannot be called; it must be a Pyro model."
        )
    model: Callable[..., Any] = found
    return model


def load_data(path: Path) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """``x``, ``y`` and out-of-distribution sets of an ``.npz`` file; floating-point numbers as ``float32``.

    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it is no such file, or lacks ``x``.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.tensor(file[name]) for name in file.files}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--data {path} is not an .npz file of plain arrays ({error}); numpy.savez writes one."
        ) from error
    if "x" not in arrays:
        raise ValueError(f"--data {path} holds {sorted(arrays)}; it must hold the inputs as x.")
    arrays = {name: value.float() if value.is_floating_point() else value for name, value in arrays.items()}
    ood = {name.removeprefix(_OOD): value for name, value in arrays.items() if name.startswith(_OOD)}
    return arrays["x"], arrays.get("y"), ood
