"""Writes a data set to any url: its shards first, its manifest last, so that a manifest means that everything is
there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

from cache.errors import ObjectNotFound
from cache.origin.registry import close_origins, origin_for


def publish(url: str, manifest: dict[str, Any], shards: Iterable[tuple[str, bytes]]) -> bool:
    """Writes the shards (name, bytes) below `url` and then `manifest.json`; each object appears whole or not at all.

    False, and nothing is written, if a manifest that says the same is already there: rewriting objects would give
    them new etags, and every cache would have to fetch them again.
    """
    return asyncio.run(_publish(url.rstrip("/"), json.dumps(manifest, indent=2, sort_keys=True).encode(), shards))


async def _publish(url: str, manifest: bytes, shards: Iterable[tuple[str, bytes]]) -> bool:
    origin = origin_for(url)
    try:
        try:
            found = await origin.head(f"{url}/manifest.json")
            if bytes(await origin.get_range(found.url, found.etag, 0, found.size_bytes)) == manifest:
                return False
        except ObjectNotFound:
            pass
        for name, data in shards:
            await origin.put(f"{url}/{name}", data)
        await origin.put(f"{url}/manifest.json", manifest)
        return True
    finally:
        await close_origins()
