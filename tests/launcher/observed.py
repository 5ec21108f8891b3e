"""A rank's observer and its page, in one process, as the runner and the agent have them in two."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from launcher.node import progress

INSTRUMENT = Path(progress.__file__).with_name("instrument.py")


def load_instrument() -> dict[str, Any]:
    """As the runner loads it: a namespace of its own."""
    namespace: dict[str, Any] = {"__name__": "_railhead_observer", "__file__": str(INSTRUMENT)}
    exec(compile(INSTRUMENT.read_text(), str(INSTRUMENT), "exec", dont_inherit=True), namespace)
    return namespace


class Observed:
    """`observer` writes, `page` is what the agent maps."""

    def __init__(self, directory: Path) -> None:
        self.fd = progress.create()
        os.symlink(f"/proc/{os.getpid()}/fd/{self.fd}", directory / "progress")
        self.page = progress.Page(self.fd, writable=False)
        self.writable = progress.open_page(str(directory), writable=True)
        self.observer = load_instrument()["observe"](self.writable)

    @property
    def steps(self) -> int | None:
        return int(self.page.hot[progress.H_STEPS]) or None

    def step(self, optimizer: object) -> None:
        self.observer.on_step(optimizer, (), {})

    def close(self) -> None:
        self.page.close()
        self.writable.close()
        os.close(self.fd)
