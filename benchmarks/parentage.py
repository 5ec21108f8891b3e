"""Servers that a benchmark starts end with it, however it ends."""

from __future__ import annotations

import shutil
from collections.abc import Sequence


def ends_with_us(command: Sequence[str]) -> list[str]:
    """`command`, killed by the kernel when the thread that starts it ends; as it is where util-linux has no `setpriv`.

    A `with` block ends its server on every exception; this is for SIGTERM and SIGKILL, which run no `finally`."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", *command] if setpriv else list(command)
