# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Writes a page: its text, its model, and its runtime where there is one."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
from torch import nn

from pyro_apd._version import __version__
from pyro_apd.page import runtime
from pyro_apd.page.inputs import PageInputs
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.runtime.files import atomic_write
from pyro_apd.runtime.optional_packages import require

_OF_CLASSES = ("mean", "predictive_entropy", "mutual_information", "networks")
_OF_REALS = ("mean", "variance", "model_variance", "lower", "upper", "networks")
_INTERVAL = 0.9


def write_page(
    posterior: DistilledPosterior,
    inputs: PageInputs,
    out: str | os.PathLike[str],
    *,
    net: nn.Module | None = None,
    classes: Sequence[str] | None = None,
    title: str = "A distilled posterior",
    num_draws: int = 50,
    link: str | None = None,
    runtime_path: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Path:
    """Writes a folder of static files, which need neither a server nor a network: open its ``index.html``.

    :param posterior: what is shown.
    :param PageInputs inputs: what can be changed.
    :param out: folder, made if missing, for ``index.html``, ``model.onnx``, ``model.js`` and ``runtime.js``.
    :param net: the architecture, as in :meth:`DistilledPosterior.bind`.
    :param classes: names of the classes; by default numbers.
    :param str title: heading of the page.
    :param int num_draws: networks that answer.
    :param str link: of a plain network's outputs, as in :meth:`DistilledPosterior.ensemble`.
    :param runtime_path: the archive of onnxruntime-web that ``npm pack`` fetches, or a folder; without it the page says
        how to get it.
    :param int seed: of the networks.
    :returns: path of ``index.html``.
    :raises ValueError: if the network, names of classes or runtime do not fit.
    :raises ImportError: if packages of the extra ``onnx``, or jinja2, are missing.
    """
    folder = Path(out)
    prediction = posterior.prediction(net, ("mean",), num_draws=1, link=link)
    is_class = prediction.network.link != "identity"
    example = torch.tensor(inputs.start).reshape(1, *inputs.shape)
    with torch.no_grad():
        (mean,) = prediction(example.to(posterior.dtype))
    names = _class_names(mean, prediction.network.link, classes)
    folder.mkdir(parents=True, exist_ok=True)
    outputs = _OF_CLASSES if is_class else _OF_REALS
    posterior.export_onnx(
        folder / "model.onnx",
        net=net,
        outputs=outputs,
        num_draws=num_draws,
        link=link,
        interval=_INTERVAL,
        seed=seed,
        example=example,
    )
    model = (folder / "model.onnx").read_bytes()
    _write(folder / "model.js", f'window.APD_MODEL = "{base64.b64encode(model).decode("ascii")}";\n')
    if runtime_path is not None:
        _write(folder / "runtime.js", runtime.runtime_script(Path(runtime_path)))
    config = {
        **inputs.to_json(),
        "input": "x",
        "classes": names,
        "outputs": list(outputs),
        "numDraws": num_draws,
    }
    _write(folder / "index.html", _page(config, title, len(model), has_runtime=(folder / "runtime.js").exists()))
    return folder / "index.html"


def _class_names(mean: torch.Tensor, link: str, classes: Sequence[str] | None) -> list[str] | None:
    """Names of the classes, or None for reals.

    :raises ValueError: if their number is not that of the network, or it has several outputs that are no classes.
    """
    if link == "softmax" and mean.dim() == 2:
        names = [str(k) for k in range(mean.shape[1])] if classes is None else [str(name) for name in classes]
        if len(names) != mean.shape[1]:
            raise ValueError(f"There are {len(names)} names of classes, and the network has {mean.shape[1]}.")
        return names
    if link == "identity" and mean.numel() == 1:
        return None
    raise ValueError(
        f"A page shows one class of several, or one real number; the network's outputs have shape {tuple(mean.shape)} "
        f"for one row and link '{link}'."
    )


def _page(config: dict[str, object], title: str, num_bytes: int, *, has_runtime: bool) -> str:
    jinja = require("jinja2", purpose="A page")
    folder = files("pyro_apd.page")
    environment = jinja.Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    template = environment.from_string((folder / "page.html.jinja").read_text(encoding="utf-8"))
    markup = require("markupsafe", purpose="A page").Markup
    # A script ends at the first "</", also within a text.
    data = json.dumps(config).replace("</", "<\\/")
    page: str = template.render(
        title=title,
        version=__version__,
        css=markup((folder / "page.css").read_text(encoding="utf-8")),
        script=markup((folder / "page.js").read_text(encoding="utf-8")),
        config=markup(data),
        classes=config["classes"],
        image=config["image"],
        examples=config["examples"],
        num_draws=config["numDraws"],
        percent=round(100 * _INTERVAL),
        model_bytes=f"{num_bytes:,} bytes",
        has_runtime=has_runtime,
        runtime_version=runtime.VERSION,
        metadata="",
    )
    return page


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
