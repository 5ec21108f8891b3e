"""Which urls a person has pinned, kept over restarts. Blocking; used by one disk thread.

<dir>/pins.json      a list of urls
"""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path

from cache.store.files import disk_error

log = logging.getLogger("railhead.cache")

NAME = "pins.json"


def load_pins(directory: Path) -> tuple[str, ...]:
    """None of them where the file cannot be read: that is said, for what they were is lost."""
    try:
        listed = json.loads((directory / NAME).read_text())
        if not isinstance(listed, list) or not all(isinstance(url, str) for url in listed):
            raise ValueError("not a list of urls")
        return tuple(listed)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s): nothing is pinned any more", directory / NAME, error)
        return ()


def save_pins(directory: Path, urls: tuple[str, ...]) -> None:
    """Whole or not at all. Raises DiskError."""
    temporary = directory / f"{NAME}.tmp"
    try:
        temporary.write_text(json.dumps(list(urls), indent=1) + "\n")
        temporary.chmod(0o600)
        temporary.replace(directory / NAME)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise disk_error(error, f"cannot keep the pins in {directory}") from error
