# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Writes the page."""

from tests.refusals.page import PAGE, page

PAGE.write_text(page())
