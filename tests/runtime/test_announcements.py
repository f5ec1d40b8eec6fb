# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import logging

import pytest

from pyro_apd.runtime import announcements
from pyro_apd.runtime.announcements import announce, listening


def test_the_last_listener_is_told_and_the_log(caplog):
    outer, inner = [], []
    with caplog.at_level(logging.INFO, "pyro_apd"), listening(outer.append):
        with listening(inner.append):
            announce("Compiling again")
        announce("Compiling")
    announce("To nobody")
    assert (outer, inner) == (["Compiling"], ["Compiling again"])
    assert caplog.messages[:2] == ["Compiling again.", "Compiling."]


def test_nobody_listens_after_an_error():
    with pytest.raises(KeyboardInterrupt), listening(print):
        raise KeyboardInterrupt
    assert not announcements._LISTENERS
