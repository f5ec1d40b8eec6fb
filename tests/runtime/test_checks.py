# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import math

import numpy as np
import pytest

from pyro_apd.runtime import checks


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_integers_of_numpy_count(value):
    found = checks.integer("n", value)
    assert found == 3
    assert type(found) is int


@pytest.mark.parametrize("value", [True, np.True_, 3.0, np.float64(3), "3", None, 0, -1])
def test_what_is_no_positive_integer(value):
    with pytest.raises(ValueError, match=r"^n=.* must be a positive integer\. Give rows\.$"):
        checks.integer("n", value, hint="Give rows.")


def test_bounds_of_integers_are_in_the_error():
    assert checks.integer("n", 0, at_least=0) == 0
    with pytest.raises(ValueError, match=r"n=1 must be an integer >= 2\."):
        checks.integer("n", 1, at_least=2)
    with pytest.raises(ValueError, match=r"n=9 must be an integer from 1 to 8\."):
        checks.integer("n", 9, at_most=8)


@pytest.mark.parametrize("value", [1, 1.0, np.float32(1), np.int16(1)])
def test_numbers_become_floats(value):
    found = checks.number("rate", value, above=0)
    assert found == 1.0
    assert type(found) is float


@pytest.mark.parametrize("value", [True, math.nan, math.inf, -math.inf, "1", None, 0, -1.0])
def test_what_is_no_positive_number(value):
    with pytest.raises(ValueError, match=r"^rate=.* must be a positive finite number\.$"):
        checks.number("rate", value, above=0)


def test_bounds_of_numbers_are_in_the_error():
    assert checks.number("share", 0.0, at_least=0, at_most=1) == 0.0
    with pytest.raises(ValueError, match=r"share=2 must be a finite number >= 0 and <= 1\."):
        checks.number("share", 2, at_least=0, at_most=1)
    with pytest.raises(ValueError, match=r"share=1 must be a finite number > 0 and < 1\."):
        checks.number("share", 1, above=0, below=1)
    with pytest.raises(ValueError, match=r"share=nan must be a finite number\."):
        checks.number("share", math.nan)


def test_flags_and_choices():
    assert checks.flag("replacement", np.True_) is True
    with pytest.raises(ValueError, match="replacement=1 must be True or False"):
        checks.flag("replacement", 1)
    assert checks.choice("mode", "a", ("a", "b")) == "a"
    with pytest.raises(ValueError, match=r"mode='c' must be one of 'a', 'b'\."):
        checks.choice("mode", "c", ("a", "b"))
    with pytest.raises(ValueError, match="mode=1 must be one of"):
        checks.choice("mode", 1, ("a", "b"))
