# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Takes the pictures of the concepts page out of the executed tutorials: ``python docs/site/images.py``."""

import base64
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Name of the file: the tutorial, and what the code of the cell that draws it holds.
PICTURES = {
    "six_networks": ("01_first_distilled_posterior", "Six networks of one posterior"),
    "surfaces": ("01_first_distilled_posterior", "plots.decision_surfaces("),
    "candidates": ("03_is_it_any_good", 'for ax, name in zip(axes, ("distilled", "collapsed", "narrow")'),
}


def picture(tutorial: str, mark: str) -> bytes:
    """The PNG that the only cell with ``mark`` in its code has put out."""
    cells = json.loads((ROOT / "tutorials" / f"{tutorial}.ipynb").read_text())["cells"]
    (cell,) = [cell for cell in cells if cell["cell_type"] == "code" and mark in "".join(cell["source"])]
    (png,) = [output["data"]["image/png"] for output in cell["outputs"] if "image/png" in output.get("data", {})]
    return base64.b64decode(png)


if __name__ == "__main__":
    for name, (tutorial, mark) in PICTURES.items():
        (ROOT / "docs" / "images" / f"{name}.png").write_bytes(picture(tutorial, mark))
