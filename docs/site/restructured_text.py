# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Docstrings are reStructuredText, as Pyro's are; the site is Markdown. This turns roles and equations into code."""

import re

import griffe

_ROLE = re.compile(r":(?:\w+:)?\w+:`(?:[^`<]*<)?~?([^`>]+)>?`")
_LITERAL_BLOCK = re.compile(r"^(\s*)\.\. (?:math|code-block)::.*$", flags=re.MULTILINE)
# The parser needs two lines for ``:ivar type name:``.
_TYPED_ATTRIBUTE = re.compile(r"^:ivar ([\w.\[\], ]+) (\w+):", flags=re.MULTILINE)


def as_markdown(text: str) -> str:
    """``:class:`~a.b``` becomes code, ``.. math::`` and ``Example::`` introduce an indented block."""
    text = _ROLE.sub(lambda found: f"`{found[1].removeprefix('pyro_apd.')}`", text)
    text = _TYPED_ATTRIBUTE.sub(r":vartype \2: \1\n:ivar \2:", text)
    text = re.sub(r"^:raises: ", ":raises Exception: ", text, flags=re.MULTILINE)
    text = _LITERAL_BLOCK.sub("", text)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


class RestructuredText(griffe.Extension):
    """Rewrites each docstring before its sections are read."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Called by griffe for every object that it loads."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
