# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The page ``docs/what_is_refused.md``, from the entries."""

import importlib
import textwrap
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "what_is_refused.md"
# Headings by module of this folder, in the order of the page.
GROUPS = {
    "likelihoods": "Likelihoods of mini-batches",
    "models": "Models",
    "inputs": "Data and settings",
    "checkpoints": "Checkpoints",
    "files": "Files of posteriors",
    "threads": "Threads",
    "results": "Draws and their evaluation",
}
HEADER = """\
# What is refused

<!-- Written by `python -m tests.refusals` from tests/refusals; edit the entries there. -->

A posterior that is wrong looks like one that is right. So what would give a wrong number is refused before the first
step, with an error that names the site or the argument, what was found, and what to write instead. Each example below
is a test; `x` `(40, 3)`, `y` `(40,)` and `labels` `(40,)` are data, and `sample(model, *data, batch_size=None)` runs
`apd.MCMC(apd.SGLD(model, 1e-5, batch_size=batch_size), ...)`.
"""


def groups():
    """The entries by heading."""
    return {heading: importlib.import_module(f"tests.refusals.{name}").REFUSALS for name, heading in GROUPS.items()}


def entry(refusal):
    """Markdown of one entry."""
    parts = [f"### {refusal.title}", refusal.why, f"```python\n{refusal.code()}\n```", f"`{refusal.error.__name__}`"]
    if refusal.instead:
        parts += ["Instead:", f"```python\n{textwrap.dedent(refusal.instead).strip()}\n```"]
    return "\n\n".join(parts)


def page():
    """The whole page."""
    parts = [HEADER.rstrip()]
    for heading, refusals in groups().items():
        parts += [f"## {heading}", *map(entry, refusals)]
    return "\n\n".join(parts) + "\n"
