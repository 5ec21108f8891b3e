"""Writes the index of a prefix beside its shards, so that no node has to read their headers.

Shards that change later have other etags: their entries are not believed any more, and only they are read. So publishing is worth it for
data that is written once and read by many, and harmless otherwise.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from cache.client.client import Cache
from cache.client.formats.pack import encode_pack, format_identity, pack_url
from cache.client.formats.ports import ManifestFormat, ShardFormat
from cache.client.indexing import build_shard_indices
from cache.errors import FormatError
from cache.origin.registry import close_origins, origin_for
from cache.origin.urls import canonical_url


@dataclass(frozen=True)
class Published:
    url: str
    num_shards: int
    num_samples: int
    num_bytes: int
    num_built: int
    """Shards whose headers had to be read; of the others the index was there already."""


def publish_index(cache: Cache, url: str, shard_format: ShardFormat | ManifestFormat) -> Published:
    """Reads the shards below the prefix `url` and writes their index there, in one object. Raises FormatError, ObjectNotFound and the
    origin's errors, AccessDenied among them where this process may not write."""
    identity = format_identity(shard_format)
    if identity is None:
        raise FormatError(
            f"{url}: {shard_format!r} needs no index beside its shards", advice="nothing is to be done for it", url=url
        )
    root = canonical_url(url)
    indices, num_built = build_shard_indices(cache, [root], shard_format)
    data = encode_pack(root, identity, indices)
    target = pack_url(root, identity)
    asyncio.run(_put(target, data))
    num_samples = sum(index.num_samples for index in indices.values())
    return Published(target, len(indices), num_samples, len(data), num_built)


async def _put(url: str, data: bytes) -> None:
    try:
        await origin_for(url).put(url, data)
    finally:
        await close_origins()
