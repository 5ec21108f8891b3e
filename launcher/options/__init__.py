"""The command line: `table` (the flags), `parse` (argv, cut), `values` (texts as values), `intent` (what is meant), `helptext`.

All pure; `launcher.cli` reads argv, the environment and the disk.
"""

from __future__ import annotations
