# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The command line: ``pyro-apd demo``, ``inspect``, ``report`` and ``page``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import pyro_apd
from pyro_apd.cli import page as page_command
from pyro_apd.cli import report as report_command

DESCRIPTION = "Sample the posterior of a Bayesian neural network in Pyro, and distil it into one small file."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    arguments = _parser().parse_args(argv)
    _show_messages()
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except (ValueError, ImportError, OSError) as error:
        print(f"pyro-apd: {error}", file=sys.stderr)
        return 2


def _show_messages() -> None:
    """The package's own messages on standard output, as they are; those of other packages where they were."""
    logger = logging.getLogger("pyro_apd")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pyro-apd", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"pyro-apd {pyro_apd.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="the whole workflow on handwritten digits, in a few minutes",
        description="Samples a 64-50-10 Bayesian neural network on scikit-learn's 1,797 digits with SGLD, distils the "
        "chains into a generator, compares the two, and writes posterior.safetensors, chains.nc, report.html and a "
        "page for the browser.",
    )
    demo.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the files (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="makes the run reproducible (%(default)s)")
    demo.add_argument("--quick", action="store_true", help="a much smaller run, to check that everything works")
    demo.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda (%(default)s)")
    demo.add_argument("--runtime", type=Path, metavar="PATH", help="of the page, see `pyro-apd page --help`")
    demo.set_defaults(run=_run_demo)
    report_command.add_parser(commands)
    page_command.add_parser(commands)
    inspect = commands.add_parser(
        "inspect",
        help="contents of a file of a distilled posterior",
        description="Prints the description in a file: versions, sites, generator, metadata. Nothing in it is "
        "executed; its tensors are checked and not printed.",
    )
    inspect.add_argument("file", type=Path, metavar="FILE", help="what DistilledPosterior.save wrote")
    inspect.add_argument("--json", action="store_true", help="print the description as JSON")
    inspect.set_defaults(run=_run_inspect)
    return parser


def _run_inspect(arguments: argparse.Namespace) -> int:
    from pyro_apd.cli import inspect

    print(inspect.as_json(arguments.file) if arguments.json else inspect.describe(arguments.file))
    return 0


def _run_demo(arguments: argparse.Namespace) -> int:
    from pyro_apd.cli import demo

    budget = demo.QUICK if arguments.quick else demo.FULL
    demo.require_device(arguments.device)
    result = demo.run_demo(
        arguments.out, seed=arguments.seed, budget=budget, device=arguments.device, runtime=arguments.runtime
    )
    print(f"\n{result.fidelity}\n")
    if arguments.quick:
        print("This was --quick: too few draws for a meaningful table.\n")
    print(f"Finished in {result.seconds:.0f} s. Open this first:\n  {result.report_path}")
    if result.page_path is not None:
        print(f"A page in which 50 networks answer:\n  {result.page_path}")
    print(f"The posterior, to ship:\n  {result.posterior_path}  ({result.posterior_path.stat().st_size:,} bytes)")
    print(f"Chains and generator for ArviZ:\n  {result.chains_path}")
    out = arguments.out
    print(
        f"The report again, from files:\n  pyro-apd report {out / 'chains.nc'} {out / 'posterior.safetensors'} "
        f"--model 'pyro_apd.cli.demo:digit_model()' --data {out / 'test.npz'} --image 8x8"
    )
    return 0
