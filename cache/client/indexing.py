"""A data set's urls → the index of its samples: list, open, read headers, several shards at once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cache.client.client import Cache
from cache.client.formats.index import SampleIndex, Shard, ShardIndex, join
from cache.client.formats.ports import ListedFormat, ShardFormat
from cache.errors import ObjectNotFound
from cache.origin.ports import ObjectInfo

NUM_INDEX_THREADS = 8
"""Reading headers waits for the origin most of the time, and parsing holds Python's lock: more threads than this gain
nothing."""


@dataclass(frozen=True)
class IndexReport:
    """An index, and what of the data set was on this node's disk before indexing read from it."""

    index: SampleIndex
    resident_bytes: tuple[int, ...] | None
    """Of each shard, when it was opened. None without a daemon, or when no shard had to be opened."""


def build_index(cache: Cache, urls: str | Sequence[str], shard_format: ShardFormat | ListedFormat) -> IndexReport:
    """The index over all shards below these urls (prefixes or objects), in the order given, each prefix sorted by url.

    Each shard is pinned at the etag that was listed: it is read at this generation or not at all. Raises FormatError
    for a malformed shard, ObjectNotFound when there is none, and the origin's errors.
    """
    roots = [urls] if isinstance(urls, str) else list(urls)
    objects = [(root, info) for root in roots for info in cache.list(root)]
    # An object that was named is a shard whatever its name; below a prefix, the format chooses.
    chosen = [info for root, info in objects if info.url == root or shard_format.accepts(info.url)]
    if not chosen:
        raise ObjectNotFound(
            f"none of the {len(objects)} objects below {', '.join(roots)} is a shard of {shard_format}",
            advice="check the url and the suffix that the format looks for",
            url=roots[0] if roots else "",
        )
    if isinstance(shard_format, ListedFormat):
        return IndexReport(shard_format.index_listing(roots[0], chosen), None)

    def index_one(info: ObjectInfo) -> tuple[ShardIndex, int | None]:
        with cache.open(info.url, etag=info.etag) as shard:
            return shard_format.index(shard), shard.on_disk_bytes

    with ThreadPoolExecutor(min(NUM_INDEX_THREADS, len(chosen)), thread_name_prefix="railhead-index") as pool:
        indexed = list(pool.map(index_one, chosen))
    shards = [Shard(info.url, info.etag, info.size_bytes) for info in chosen]
    on_disk = tuple(resident for _, resident in indexed if resident is not None)
    return IndexReport(join(shards, [index for index, _ in indexed]), on_disk if len(on_disk) == len(indexed) else None)
