# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What is refused: each entry is a short example, which is tested and which ``docs/what_is_refused.md`` shows.

``python -m tests.refusals`` writes the page. A group of entries is a module of this folder with a list ``REFUSALS``.
"""
