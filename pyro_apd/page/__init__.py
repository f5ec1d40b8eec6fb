# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A page for the browser, in which a person changes the inputs of a posterior's networks and sees how they disagree."""

from pyro_apd.page.build import write_page
from pyro_apd.page.inputs import PageInputs

__all__ = ["PageInputs", "write_page"]
