# SPDX-License-Identifier: Apache-2.0
"""`python -m hisac`."""

import sys

from .app.cli import main

if __name__ == "__main__":
    sys.exit(main())
