"""Reading files of a machine below a given root, without ever failing.

The same code reads the live machine ("/") and a copy or an imitation of another one. What cannot be read is None: missing,
forbidden, garbage, or an EINVAL of the kernel are all the same to the caller, who treats None as unknown.
"""

from __future__ import annotations

import os
from pathlib import Path

MAX_BYTES = 1 << 20
"""Nothing in sysfs or procfs that matters here is larger; a huge file in its place must not be swallowed whole."""


class Root:
    """A machine's file tree. Paths are given without the leading slash: "sys/class/net"."""

    def __init__(self, path: str | Path = "/") -> None:
        self.path = Path(path)

    @property
    def is_live(self) -> bool:
        """Whether this is the running machine, so that system calls tell about the same one."""
        return self.path == Path("/")

    def text(self, name: str) -> str | None:
        """The file's content without surrounding space; None if it cannot be read."""
        raw = self.binary(name)
        return None if raw is None else raw.decode("utf-8", "replace").strip()

    def binary(self, name: str) -> bytes | None:
        try:
            # Unbuffered: sysfs files may answer a second read with an error.
            with open(self.path / name, "rb", buffering=0) as file:
                parts, size = [], 0
                while size < MAX_BYTES:
                    part = file.read(65536)
                    if not part:
                        break
                    parts.append(part)
                    size += len(part)
                return b"".join(parts)
        except (OSError, ValueError):
            return None

    def integer(self, name: str, *, base: int = 10) -> int | None:
        text = self.text(name)
        if text is None:
            return None
        try:
            return int(text, base)
        except ValueError:
            return None

    def names(self, name: str) -> list[str] | None:
        """What a folder holds, in natural order (2 before 10); None if there is no such folder."""
        try:
            return sorted(os.listdir(self.path / name), key=natural_key)
        except (OSError, ValueError):
            return None

    def exists(self, name: str) -> bool:
        try:
            return os.path.lexists(self.path / name)
        except (OSError, ValueError):
            return False

    def resolved(self, name: str) -> str | None:
        """Where a path leads, as a path below the root; None if there is nothing. Links cannot lead out of the root."""
        parts = [part for part in name.split("/") if part]
        done: list[str] = []
        for _ in range(200):
            if not parts:
                return "/".join(done) if self.exists("/".join(done)) else None
            part = parts.pop(0)
            if part in ("", "."):
                continue
            if part == "..":
                done = done[:-1]
                continue
            here = "/".join([*done, part])
            try:
                target = os.readlink(self.path / here)
            except (OSError, ValueError):
                done.append(part)
                continue
            if target.startswith("/"):
                done = []
            parts = target.split("/") + parts
        return None


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts mlx5_2 before mlx5_10.

    >>> sorted(["mlx5_10", "mlx5_2"], key=natural_key)
    ['mlx5_2', 'mlx5_10']
    """
    key: list[tuple[int, int, str]] = []
    digits, letters = "", ""
    for char in name + "\0":
        if char in "0123456789":
            if letters:
                key.append((1, 0, letters))
                letters = ""
            digits += char
        else:
            if digits:
                key.append((0, int(digits), ""))
                digits = ""
            if char != "\0":
                letters += char
    if letters:
        key.append((1, 0, letters))
    return tuple(key)
