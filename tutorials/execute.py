# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Runs tutorials in full and writes their notebooks: ``python tutorials/execute.py 01 07``; without numbers, all.

Where only the prose of a source has changed, ``--text`` brings it into the notebook and leaves the outputs.

The sources are the ``.py`` files, in jupytext's percent format. Paths of the machine are taken out of what the cells
printed, so that a notebook is the same wherever it was made.
"""

import os
import re
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
# Folders in front of packages and of this checkout.
_PATHS = re.compile(r"(?:/[\w.+-]+)+/(?=(?:pyro_apd|pyro|torch|tqdm|sklearn|arviz)/[\w/]+\.py)")


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Takes absolute paths out of printed text, and joins what was printed in pieces, in place."""
    for cell in notebook.cells:
        joined: list[nbformat.NotebookNode] = []
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.text = _PATHS.sub("", output.text)
                if joined and joined[-1].get("name") == output.name:
                    joined[-1].text += output.text
                    continue
            joined.append(output)
        if "outputs" in cell:
            cell.outputs = joined


def execute(source: Path) -> tuple[float, float]:
    """Runs a tutorial in full and writes the notebook beside it.

    :returns: seconds it took, and of CPU time of its kernel (zero where the system does not say).
    """
    notebook = jupytext.read(source)
    start, before = time.monotonic(), os.times()
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(FOLDER)}}).execute()
    seconds, after = time.monotonic() - start, os.times()
    cpu_seconds = sum(after[2:4]) - sum(before[2:4])
    tidy(notebook)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell.metadata.pop("execution", None)
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    return seconds, cpu_seconds


def renew_text(source: Path) -> None:
    """Takes the prose of a source into its notebook.

    :raises ValueError: if the code differs, too.
    """
    path = source.with_suffix(".ipynb")
    notebook, new = nbformat.read(path, as_version=4), jupytext.read(source)
    code, new_code = ([cell for cell in part.cells if cell.cell_type == "code"] for part in (notebook, new))
    if [cell.source for cell in code] != [cell.source for cell in new_code]:
        raise ValueError(f"The code of {source.name} has changed since {path.name} was executed; execute it.")
    outputs = iter(code)
    notebook.cells = [next(outputs) if cell.cell_type == "code" else cell for cell in new.cells]
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    tidy(notebook)
    nbformat.write(notebook, path)


def main(wanted: list[str]) -> None:
    """Runs the tutorials whose names begin with one of ``wanted``."""
    is_text, numbers = "--text" in wanted, [word for word in wanted if word != "--text"]
    for source in sorted(FOLDER.glob("[0-9][0-9]_*.py")):
        if not numbers or any(source.name.startswith(number) for number in numbers):
            if is_text:
                renew_text(source)
                continue
            seconds, cpu_seconds = execute(source)
            size = source.with_suffix(".ipynb").stat().st_size
            print(f"{source.stem}: {seconds:.0f} s, {cpu_seconds:.0f} s of CPU, {size / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
