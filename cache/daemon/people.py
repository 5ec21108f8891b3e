"""What people ask of a daemon by hand: what is here, let go of it, keep it, another bound. From the event loop.

Everything that names objects waits until the daemon knows all that is on its disk (restoring.py): an answer after a restart is as true as
one before it.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cache.blocks import num_blocks
from cache.daemon.config import MIN_CAPACITY_BYTES, format_bytes
from cache.errors import CacheConfigError
from cache.residency import messages as m
from cache.residency.residents import KnownObject, is_below_any
from cache.store.pins import load_pins, save_pins

if TYPE_CHECKING:
    from cache.daemon.control import Control

log = logging.getLogger("railhead.cache")

LISTED_AT_ONCE = 5000
"""Objects in one answer; with long urls about 2 MB."""


class People:
    def __init__(self, control: Control) -> None:
        self._control = control

    async def load_pins(self) -> None:
        """Before anything is evicted."""
        urls = await self._control.hands.with_index(lambda directory, _: load_pins(directory.path))
        self._control.tell(m.PinsChanged(urls))

    async def list_here(self, url: str, after: str) -> dict[str, Any]:
        """Objects of which something is on the disk, below `url` (empty: all): those behind `after`, as many as go into an answer."""
        await self._control.restoring.finished()
        now = time.monotonic()
        behind = (known for known in self._here(url) if _place(known) > after)
        first = heapq.nsmallest(LISTED_AT_ONCE, behind, key=_place)
        return {
            "objects": [self._describe(known, now) for known in first],
            "after": _place(first[-1]) if len(first) == LISTED_AT_ONCE else None,
        }

    async def evict(self, url: str) -> dict[str, Any]:
        """What this node holds of an object, or of all below a prefix; the origin is not asked, for it may hold them no longer."""
        await self._control.restoring.finished()
        counters = self._control.residency.counters
        before = counters.evicted_bytes
        here = list(self._here(url))
        for known in here:
            self._control.tell(m.EvictAsked(known.object_id.content_id))
        return {
            "evicted_bytes": counters.evicted_bytes - before,
            "num_objects": len(here),
            "num_pinned": sum(known.is_pinned for known in here),
        }

    async def pin(self, url: str, *, is_pinned: bool) -> dict[str, Any]:
        """From now on, and after a restart. Raises DiskError when it cannot be written down; nothing has changed then."""
        await self._control.restoring.finished()
        pins = self._control.residency.residents.pins
        wanted = tuple(sorted({*pins, url})) if is_pinned else tuple(pin for pin in pins if pin != url)
        if wanted != pins:
            await self._control.hands.with_index(lambda directory, _: save_pins(directory.path, wanted))
            self._control.tell(m.PinsChanged(wanted))
            log.info("%s is %s", url, "pinned" if is_pinned else "pinned no longer")
        here = list(self._here(url))
        on_disk = self._control.residency.on_disk_bytes
        return {
            "pins": list(wanted),
            "was_pinned": url in pins,
            "num_objects": len(here),
            "on_disk_bytes": sum(on_disk(known.object_id.content_id) for known in here),
            "still_pinned_by": [pin for pin in wanted if is_below_any(url, [pin])],
        }

    def resize(self, capacity_bytes: int, max_files: int | None) -> dict[str, Any]:
        """Another bound, from now on until the daemon ends: no file is made beyond it. What is too much is evicted at once; what readers
        still hold follows as they let go. Raises CacheConfigError."""
        if capacity_bytes < MIN_CAPACITY_BYTES:
            raise CacheConfigError(
                f"{format_bytes(capacity_bytes)} are too little: the least is {format_bytes(MIN_CAPACITY_BYTES)}"
            )
        if max_files is not None and max_files < 1:
            raise CacheConfigError(f"a bound of {max_files} files; it must be at least 1")
        control, budget = self._control, self._control.residency.budget
        before = budget.capacity_bytes
        control.tell(m.CapacityChanged(capacity_bytes, max_files))
        if control.peers is not None:
            control.peers.resized(capacity_bytes)
        log.info("the capacity is %s now, it was %s", format_bytes(capacity_bytes), format_bytes(before))
        return {"before_bytes": before, "used_bytes": budget.used_bytes, "held_bytes": budget.held_bytes}

    def _here(self, url: str) -> Iterator[KnownObject]:
        residency = self._control.residency
        for known in list(residency.residents.objects.values()):
            is_meant = not url or is_below_any(known.object_id.url, [url])
            if is_meant and residency.on_disk_bytes(known.object_id.content_id):
                yield known

    def _describe(self, known: KnownObject, now: float) -> dict[str, Any]:
        residency, object_id = self._control.residency, known.object_id
        extents = list(residency.residents.extents_of(known))
        last_use_s = max(extent.last_use_s for extent in extents)
        return {
            "url": object_id.url,
            "etag": object_id.etag,
            "content_id": object_id.content_id,
            "size_bytes": object_id.size_bytes,
            "on_disk_bytes": residency.on_disk_bytes(object_id.content_id),
            "num_blocks": num_blocks(object_id.size_bytes),
            "readable_blocks": residency.resident_blocks(object_id.content_id),
            "extents": sorted(extent.key.extent_idx for extent in extents),
            "num_readers": len(known.clients),
            "used_ago_s": round(now - last_use_s, 3) if last_use_s > 0 else None,
            "is_pinned": known.is_pinned,
        }


def _place(known: KnownObject) -> str:
    """Two generations of one object have one url."""
    return f"{known.object_id.url}\0{known.object_id.content_id}"
