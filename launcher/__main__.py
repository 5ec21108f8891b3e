"""`python -m launcher …`; everything is in `launcher.cli`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from launcher.cli import main

    sys.exit(main())
