# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""``python -m pyro_apd`` is ``pyro-apd``."""

import sys

from pyro_apd.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
