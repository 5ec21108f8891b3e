"""Writes a data set to any url: its shards first, then the index of tar shards, its manifest last, so that a manifest means that
everything is there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

from cache.client import Cache
from cache.client.formats.tar import TarFormat
from cache.client.publishing import publish_index
from cache.errors import ObjectNotFound
from cache.origin.registry import close_origins, origin_for


def publish(
    url: str, manifest: dict[str, Any], shards: Iterable[tuple[str, bytes]], *, indexed: Iterable[str] = ()
) -> bool:
    """Writes the shards (name, bytes) below `url` and then `manifest.json`; each object appears whole or not at all.

    `indexed`: the prefixes below it that hold tar shards; their index is written beside them, as `python -m cache index` does.
    False, and nothing is written, if a manifest that says the same is already there: rewriting objects would give
    them new etags, and every cache would have to fetch them again.
    """
    url = url.rstrip("/")
    text = json.dumps(manifest, indent=2, sort_keys=True).encode()
    if not asyncio.run(_write_shards(url, text, shards)):
        return False
    with Cache("") as cache:  # past any daemon: what was just written is read once, by whoever wrote it
        for prefix in indexed:
            publish_index(cache, f"{url}/{prefix}", TarFormat())
    asyncio.run(_write(f"{url}/manifest.json", text))
    return True


async def _write_shards(url: str, manifest: bytes, shards: Iterable[tuple[str, bytes]]) -> bool:
    """False if this very manifest is there."""
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
        return True
    finally:
        await close_origins()


async def _write(url: str, data: bytes) -> None:
    try:
        await origin_for(url).put(url, data)
    finally:
        await close_origins()
