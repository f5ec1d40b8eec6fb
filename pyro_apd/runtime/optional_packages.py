# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Packages that only some functions need."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def require(package: str, *, purpose: str, extra: str | None = None) -> ModuleType:
    """A package that may be missing.

    :param str package: as it is imported.
    :param str purpose: what needs it, for the error.
    :param str extra: of pyro-apd that installs it; None: pyro-apd itself does, unless it was installed without
        dependencies.
    :raises ImportError: if it is missing; the message says how to install it.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        missing = (error.name or package).partition(".")[0]
        command = f"pip install 'pyro-apd[{extra}]'" if extra else f"pip install {missing}"
        message = f"{purpose} needs the package '{missing}', which is not installed: {command}."
        raise ImportError(message, name=missing) from error
