# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Extracts the pictures of the concepts page from the executed tutorials: ``python docs/site/images.py``."""

import base64
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Name of the file: the tutorial, and a part of the code of the cell that draws it.
PICTURES = {
    "six_networks": ("01_first_distilled_posterior", "Six networks of one posterior"),
    "surfaces": ("01_first_distilled_posterior", "plots.decision_surfaces("),
    "candidates": ("03_is_it_any_good", 'for ax, name in zip(axes, ("distilled", "collapsed", "narrow")'),
}


def picture(tutorial: str, mark: str) -> bytes:
    """The PNG from the outputs of the only cell with ``mark`` in its code."""
    cells = json.loads((ROOT / "tutorials" / f"{tutorial}.ipynb").read_text())["cells"]
    (cell,) = [cell for cell in cells if cell["cell_type"] == "code" and mark in "".join(cell["source"])]
    (png,) = [output["data"]["image/png"] for output in cell["outputs"] if "image/png" in output.get("data", {})]
    return base64.b64decode(png)


if __name__ == "__main__":
    for name, (tutorial, mark) in PICTURES.items():
        (ROOT / "docs" / "images" / f"{name}.png").write_bytes(picture(tutorial, mark))
