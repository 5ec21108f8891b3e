"""`python -m launcher …`; everything is in `launcher.cli`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    try:
        from launcher.cli import main

        sys.exit(main())
    except KeyboardInterrupt:  # before the controller handles signals: nothing has been started
        sys.exit(130)
