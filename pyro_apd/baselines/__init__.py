# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What distilled posteriors are compared against."""

from pyro_apd.baselines.dark_knowledge import DarkKnowledge, dark_knowledge

__all__ = ["DarkKnowledge", "dark_knowledge"]
