"""A data set's urls → the index of its samples: list, and take what is known of each shard; read the headers of the rest, several at once.

An index is looked for where it costs least: kept on this node by whoever built it first, published beside the shards
(`python -m cache index`), and only then built. What is found is believed of a shard only at the very etag and size that it has now.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from cache.client.client import Cache
from cache.client.formats.index import SampleIndex, Shard, ShardIndex, join
from cache.client.formats.pack import FOLDER, decode_pack, encode_pack, format_identity, pack_key, pack_url
from cache.client.formats.ports import ListedFormat, ManifestFormat, Readable, ShardFormat
from cache.client.object import CachedObject
from cache.errors import CacheError, FormatError, ObjectNotFound
from cache.origin.ports import ObjectInfo
from cache.origin.urls import canonical_url

log = logging.getLogger("railhead.cache.client")

NUM_INDEX_THREADS = 8
"""Reading headers waits for the origin most of the time, and parsing holds Python's lock: more threads than this gain
nothing."""

WALK_AHEAD_BYTES = 32 * 1024 * 1024
"""How far ahead of a walk over headers a shard is fetched: what eight walks need at once fills any link."""


@dataclass(frozen=True)
class IndexReport:
    """An index, and what of the data set was on this node's disk before indexing read from it."""

    index: SampleIndex
    resident_bytes: tuple[int, ...] | None
    """Of each shard. None without a daemon."""
    num_built: int = 0
    """Shards whose headers had to be read: of the others the index was there."""


AnyFormat = ShardFormat | ManifestFormat | ListedFormat


def build_index(cache: Cache, urls: str | Sequence[str], shard_format: AnyFormat) -> IndexReport:
    """The index over all shards below these urls (prefixes or objects), in the order given, each prefix sorted by url.

    Each shard is pinned at the etag that was listed: it is read at this generation or not at all. Raises FormatError
    for a malformed shard, ObjectNotFound when there is none, and the origin's errors.
    """
    roots = [urls] if isinstance(urls, str) else list(urls)
    listing = _listed(cache, roots, shard_format)
    resident_bytes = cache.resident_bytes(listing.chosen)
    if isinstance(shard_format, ListedFormat):
        return IndexReport(shard_format.index_listing(roots[0], listing.chosen), resident_bytes)
    indices, num_built = _indices(cache, roots, listing, shard_format)
    return IndexReport(join(list(indices), list(indices.values())), resident_bytes, num_built)


def build_shard_indices(
    cache: Cache, roots: list[str], shard_format: ShardFormat | ManifestFormat
) -> tuple[dict[Shard, ShardIndex], int]:
    """The index of each shard below these prefixes, and of how many the headers had to be read. Raises as build_index does."""
    return _indices(cache, roots, _listed(cache, roots, shard_format), shard_format)


@dataclass(frozen=True)
class _Listing:
    objects: dict[str, ObjectInfo]
    """Everything below the prefixes, by url."""
    chosen: list[ObjectInfo]
    """The shards among it."""
    entries: Mapping[str, Any] = field(default_factory=dict)
    """What a manifest says of them."""


def _listed(cache: Cache, roots: list[str], shard_format: AnyFormat) -> _Listing:
    objects = [(root, info) for root in roots for info in cache.list(root)]
    by_url = {info.url: info for _, info in objects}
    if isinstance(shard_format, ManifestFormat):
        return _manifested(cache, roots, by_url, shard_format)
    # An object that was named is a shard whatever its name; below a prefix, the format chooses.
    chosen = [
        info
        for root, info in objects
        if info.url == canonical_url(root) or (f"/{FOLDER}/" not in info.url and shard_format.accepts(info.url))
    ]
    if not chosen:
        raise ObjectNotFound(
            f"none of the {len(objects)} objects below {', '.join(roots)} is a shard of {shard_format}",
            advice="check the url and the suffix that the format looks for",
            url=roots[0] if roots else "",
        )
    return _Listing(by_url, chosen)


def _manifested(
    cache: Cache, roots: list[str], by_url: dict[str, ObjectInfo], shard_format: ManifestFormat
) -> _Listing:
    """The shards that the manifests directly below the prefixes name, in the manifests' order."""
    entries: dict[str, Any] = {}
    for root in roots:
        url = f"{canonical_url(root).rstrip('/')}/{shard_format.manifest_name}"
        info = by_url.get(url)
        if info is None:
            deeper = sorted(
                found for found in by_url if shard_format.accepts(found) and found.startswith(canonical_url(root))
            )
            hint = f"name {deeper[0].rpartition('/')[0]}" if deeper else "it is written last; is the upload complete?"
            raise ObjectNotFound(f"{url}: there is no such manifest of shards", advice=hint, url=url)
        with cache.open(info.url, etag=info.etag) as opened:
            entries |= shard_format.read_manifest(info.url, opened.read(0, opened.size), by_url)
    if not entries:
        raise ObjectNotFound(f"{', '.join(roots)}: the manifest names no shards", url=roots[0] if roots else "")
    return _Listing(by_url, [by_url[url] for url in entries], entries)


def _indices(
    cache: Cache, roots: list[str], listing: _Listing, shard_format: ShardFormat | ManifestFormat
) -> tuple[dict[Shard, ShardIndex], int]:
    shards = [Shard(info.url, info.etag, info.size_bytes) for info in listing.chosen]
    known = _Known(cache, roots, listing.objects, shard_format)
    found = known.look_for(shards)
    for shard, index in list(found.items()):
        if listing.entries and listing.entries[shard.url].num_samples != index.num_samples:
            del found[shard]  # whoever is wrong, reading the shard will tell
    missing = [shard for shard in shards if shard not in found]
    if missing:
        with ThreadPoolExecutor(min(NUM_INDEX_THREADS, len(missing)), thread_name_prefix="railhead-index") as pool:
            built = pool.map(
                lambda shard: index_shard(cache, shard, shard_format, listing.entries.get(shard.url)), missing
            )
            found |= dict(zip(missing, built, strict=True))
    indices = {shard: found[shard] for shard in shards}
    if missing:
        known.keep(indices)
    else:
        # Nothing is lost if this process ends before: the first batch need not wait for a disk.
        known.keep_meanwhile(indices)
    return indices, len(missing)


def index_shard(
    cache: Cache, shard: Shard, shard_format: ShardFormat | ManifestFormat, entry: Any = None
) -> ShardIndex:
    """Reads the headers of one shard. `entry`: what its manifest says of it."""
    with cache.open(shard.url, etag=shard.etag) as opened:
        readable: Readable = _FetchedAhead(opened) if getattr(shard_format, "walks_shards", False) else opened
        if isinstance(shard_format, ManifestFormat):
            return shard_format.index_entry(readable, entry)
        return shard_format.index(readable)


class _Known:
    """The indices that are there already, on this node and beside the shards."""

    def __init__(
        self,
        cache: Cache,
        roots: list[str],
        listed: dict[str, ObjectInfo],
        shard_format: ShardFormat | ManifestFormat,
    ) -> None:
        self._cache = cache
        self._roots = [canonical_url(root) for root in roots]
        self._listed = listed
        self._identity = format_identity(shard_format)
        self._kept: dict[Shard, ShardIndex] | None = None

    def look_for(self, shards: list[Shard]) -> dict[Shard, ShardIndex]:
        """What is known of these shards."""
        if self._identity is None:
            return {}
        self._kept = self._kept_here()
        found = {shard: self._kept[shard] for shard in shards if shard in self._kept}
        for root in self._roots if len(found) < len(shards) else ():
            published = self._published(root)
            found |= {shard: published[shard] for shard in shards if shard in published and shard not in found}
        return found

    def keep(self, indices: dict[Shard, ShardIndex]) -> None:
        """On this node, for the other ranks and for the next start; if it is not there in this very form."""
        if self._identity is not None and (self._kept is None or list(self._kept) != list(indices)):
            pack = encode_pack(self._roots[0], self._identity, indices)
            self._cache.keep_index(pack_key(self._roots, self._identity), pack)

    def keep_meanwhile(self, indices: dict[Shard, ShardIndex]) -> None:
        """Like `keep`, without being waited for."""

        def work() -> None:
            try:
                self.keep(indices)
            except CacheError as error:
                log.info("the index is not kept on this node: %s", error.message)

        threading.Thread(target=work, name="railhead-keep-index", daemon=True).start()

    def _kept_here(self) -> dict[Shard, ShardIndex]:
        assert self._identity is not None
        key = pack_key(self._roots, self._identity)
        data = self._cache.kept_index(key)
        return {} if data is None else self._decoded(self._roots[0], data, f"the index {key} that this node keeps")

    def _published(self, root: str) -> dict[Shard, ShardIndex]:
        assert self._identity is not None
        info = self._listed.get(pack_url(root, self._identity))
        if info is None:
            return {}
        try:
            with self._cache.open(info.url, etag=info.etag) as opened:
                data = opened.read(0, opened.size)
        except CacheError as error:
            log.warning("%s cannot be read, the shards' headers are read instead: %s", info.url, error.message)
            return {}
        return self._decoded(root, data, info.url)

    def _decoded(self, root: str, data: bytes, where: str) -> dict[Shard, ShardIndex]:
        assert self._identity is not None
        try:
            return decode_pack(root, self._identity, data, where=where)
        except FormatError as error:
            log.warning("%s; the shards' headers are read instead", error.message)
            return {}


class _FetchedAhead:
    """A shard that is walked from one end to the other: what lies ahead is fetched while a header is parsed."""

    def __init__(self, opened: CachedObject) -> None:
        self._opened = opened
        self._asked_until = 0
        self.url, self.size = opened.url, opened.size

    def read(self, offset: int, length: int) -> bytes:
        if offset + WALK_AHEAD_BYTES // 2 > self._asked_until and self._asked_until < self.size:
            start = max(offset, self._asked_until)
            self._opened.prefetch(start, offset + WALK_AHEAD_BYTES - start)
            self._asked_until = offset + WALK_AHEAD_BYTES
        return self._opened.read(offset, length)
