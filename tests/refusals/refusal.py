# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""One entry of the page of refusals, and how its example is run."""

import contextlib
import os
import tempfile
import textwrap
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import nn

import pyro_apd as apd


@dataclass(frozen=True)
class Refusal:
    """An input that is refused.

    :ivar str title: what is refused, as a heading.
    :ivar str example: about three lines that raise, in the names of :func:`names`.
    :ivar error: the type that is raised.
    :ivar mentions: texts that the message must contain: the site or argument, what was found, what to write instead.
    :ivar str why: one or two sentences on the wrong result that the refusal prevents.
    :ivar str instead: code to write instead; it must run. Empty where there is none.
    """

    title: str
    example: str
    error: type[Exception]
    mentions: tuple[str, ...]
    why: str
    instead: str = ""

    def code(self):
        return textwrap.dedent(self.example).strip("\n")

    def raised(self):
        """The error that the example raises; None where it raises none."""
        return error_of(self.example)


def names():
    """The names that examples use: libraries, data of 40 rows, and a run of a few steps."""
    torch.manual_seed(0)
    x = torch.randn(40, 3)

    def sample(model, *args, num_data=None, batch_size=None, **kwargs):
        kernel = apd.SGLD(model, 1e-5, batch_size=batch_size, num_data=num_data, seed=0)
        mcmc = apd.MCMC(kernel, num_samples=4, warmup_steps=2, disable_progbar=True, **kwargs)
        mcmc.run(*args)
        return mcmc

    return {
        "torch": torch,
        "nn": nn,
        "np": np,
        "pyro": pyro,
        "dist": dist,
        "poutine": poutine,
        "apd": apd,
        "x": x,
        "y": x @ torch.tensor([1.0, -1.0, 0.5]) + torch.randn(40),
        "labels": torch.arange(40) % 3,
        "sample": sample,
    }


def error_of(code):
    """What an example raises; None if nothing."""
    try:
        run(code)
    except Exception as error:
        return error
    return None


def run(code):
    """Runs an example in an empty folder, and restores what it may have changed."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.callback(os.chdir, before)
        os.chdir(folder)
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        exec(compile(textwrap.dedent(code), "<example>", "exec"), names())
