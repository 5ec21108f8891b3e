"""One object at one daemon: where its words are, and the extent files that this process was given. The hit path lives here."""

from __future__ import annotations

from typing import Any

from cache.blocks import BLOCK_BYTES, EXTENT_BYTES
from cache.client.link import Link, OpenExtent

MAX_OPEN_EXTENTS = 512
"""Extent files of one object that a process keeps open (32 GiB of data); the usual limit of descriptors is 1,024."""


class Mapping:
    """Any thread may call. It outlives its daemon: what it holds stays right, only requests fail."""

    __slots__ = (
        "__weakref__",
        "base",
        "content_id",
        "etag",
        "extents",
        "link",
        "on_disk_bytes",
        "size",
        "url",
        "words",
    )

    def __init__(self, link: Link, header: dict[str, Any]) -> None:
        self.link = link
        self.words = link.words
        self.content_id: str = header["content_id"]
        self.base: int = header["base"]
        self.url: str = header["url"]
        self.etag: str = header["etag"]
        self.size: int = header["size_bytes"]
        self.on_disk_bytes: int = header["on_disk_bytes"]
        self.extents: dict[int, OpenExtent] = {}
        link.mappings.add(self)

    def __del__(self) -> None:
        # The daemon keeps an object in mind, and its words, for who has it open.
        self.link.closed.append(self.content_id)

    def resident(self, offset: int, end: int) -> OpenExtent | None:
        """The open file that holds [offset, end), which lies within one extent, if all of it is resident there."""
        extent = self.extents.get(offset // EXTENT_BYTES)
        if extent is None:
            return None
        words, base, generation = self.words, self.base, extent.generation
        for block in range(offset // BLOCK_BYTES, (end - 1) // BLOCK_BYTES + 1):
            if words[base + block] != generation:
                return None
        return extent

    def drop_evicted(self) -> None:
        """Lets go of files that the daemon has evicted (see Link.drop_evicted, which does this for all objects)."""
        extent_words = self.base + -(-self.size // BLOCK_BYTES)
        held = list(self.extents.items())
        gone = [extent_idx for extent_idx, extent in held if self.words[extent_words + extent_idx] != extent.generation]
        del held
        for extent_idx in gone:
            self.extents.pop(extent_idx, None)
