"""Where a reader stands in an object: what Python's raw files need besides the reading itself."""

from __future__ import annotations

import io


class SeekingFile(io.RawIOBase):
    """A readable raw file of known size whose bytes a subclass reads at `position`, which it moves on."""

    def __init__(self, size: int, name: str) -> None:
        self.size = size
        self._name = name
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Also beyond the end, where reads give nothing. Raises ValueError before the beginning."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset} of {self._name}")
        self.position = base + offset
        return self.position
