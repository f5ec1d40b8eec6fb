# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A package that is missing is named, with what needs it and how to install it."""

import sys

import pytest

from pyro_apd.runtime.optional_packages import require


def test_a_package_that_is_there():
    assert require("json", purpose="A test").dumps([]) == "[]"


@pytest.mark.parametrize(
    ("extra", "command"), [(None, "pip install absent"), ("onnx", "pip install 'pyro-apd\\[onnx\\]'")]
)
def test_a_missing_package(extra, command):
    with pytest.raises(
        ImportError, match=f"A test needs the package 'absent', which is not installed: {command}"
    ) as info:
        require("absent.part", purpose="A test", extra=extra)
    assert info.value.name == "absent"


def test_what_a_package_itself_lacks_is_named(monkeypatch, tmp_path):
    (tmp_path / "needy.py").write_text("import missing_below")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="pip install missing_below"):
        require("needy", purpose="A test")
    assert "needy" not in sys.modules
