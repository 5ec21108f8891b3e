"""`python -m launcher …`; everything is in `launcher.cli`."""

from __future__ import annotations

import os
import sys


def _leave(code: int) -> None:
    """Ends the process. Where the head of the Ray cluster was lost, at once: threads still wait for it inside Ray, and to tear the
    interpreter down around them ends in SIGSEGV instead of the code (seen with Ray 2.60)."""
    head = sys.modules.get("launcher.cluster.ray.head")
    if head is not None and head.is_forgotten():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    try:
        from launcher.cli import main

        _leave(main())
    except KeyboardInterrupt:  # before the controller handles signals: nothing has been started
        sys.exit(130)
