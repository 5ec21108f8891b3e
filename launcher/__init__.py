"""Runs one training program as a gang of ranks: on this machine, or on the nodes of a Ray cluster.

`python -m launcher train.py` is the door; docs/ARCHITECTURE.md draws the house. This package imports neither torch nor, without
an address, ray: the time from the command to the first rank is part of what it promises.
"""

from __future__ import annotations

from launcher.watching import expect_steps, pause_watch

__all__ = ["expect_steps", "pause_watch"]
