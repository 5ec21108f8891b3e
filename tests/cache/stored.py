"""An object in memory, as an opened shard."""

from __future__ import annotations


class Stored:
    def __init__(self, data: bytes, url: str = "mem://b/shard") -> None:
        self.data, self.url, self.size = data, url, len(data)
        self.bytes_read = 0

    def read(self, offset: int, length: int) -> bytes:
        assert offset >= 0 and length >= 0
        found = self.data[offset : offset + length]
        self.bytes_read += len(found)
        return found
