# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pytest

from pyro_apd.runtime.stages import stages


def test_the_line_says_what_is_being_done(capsys):
    with stages("Fit", True) as note:
        note("first part")
        assert "Fit: first part [" in capsys.readouterr().err
    assert "Fit: done [" in capsys.readouterr().err


def test_nothing_is_shown_where_progress_is_off(capsys):
    with stages("Fit", False) as note:
        note("first part")
    assert capsys.readouterr().err == ""


def test_an_error_does_not_end_in_done(capsys):
    with pytest.raises(ValueError, match="no"), stages("Fit", True):
        raise ValueError("no")
    assert "done" not in capsys.readouterr().err
