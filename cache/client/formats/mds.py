"""MosaicML's MDS shards, read where they lie: `index.json` names the shards, each shard has a table of its samples.

    shard:   number of samples (uint32), offsets of the samples and of the end (uint32 each), JSON of the writer's settings, samples
    sample:  sizes (uint32) of the columns whose size varies, then all columns, in the order of their names in index.json

A shard that is stored plainly is read sample by sample: one range each, whatever the shuffle. A compressed one (zstd, gz, br, bz2,
snappy) can only be read whole: its samples form a *unit*, which is unpacked in memory and kept while there is room for it.

What is refused with a FormatError: another version or layout (JSON, CSV and XSV shards), pickled columns unless they are allowed, a shard
that index.json names and the store lacks, sizes or counts that differ between index.json, the store and the shard.

Source: mosaicml-streaming 0.13, streaming/base/format/mds/{reader,writer}.py.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from cache.client.formats.decompress import NAMES as CODECS
from cache.client.formats.decompress import decompress
from cache.client.formats.index import Ints, ShardIndex
from cache.client.formats.mds_encodings import Decoder, decoder_for, fixed_size
from cache.client.formats.ports import Readable
from cache.errors import FormatError

if TYPE_CHECKING:
    from cache.origin.ports import ObjectInfo

MAX_SHARD_BYTES = 2**32 - 1
"""Offsets within a shard are uint32."""


@dataclass(frozen=True)
class Entry:
    """What index.json says of one shard."""

    num_samples: int
    raw_bytes: int
    schema: str
    """The columns as JSON: [[name, encoding, size or null], …]."""
    codec: str | None
    """None when the object in the store is the plain shard."""


@dataclass(frozen=True)
class MdsFormat:
    """MDS shards; see the module's docstring. The url to give is the directory that holds index.json."""

    allow_pickle: bool = field(default=False, repr=False)
    """Accept columns of encoding `pkl`: reading them runs code of whoever wrote the data set."""
    decode_images: bool = field(default=False, repr=False)
    """Give images as Pillow's, like MosaicML does, and not as the bytes of their files. Needs Pillow (extra `examples`)."""
    manifest_name: ClassVar[str] = "index.json"
    index_version: ClassVar[int] = 1

    def accepts(self, url: str) -> bool:
        return url.rpartition("/")[2] == self.manifest_name

    def read_manifest(self, url: str, data: bytes, listed: Mapping[str, ObjectInfo]) -> dict[str, Entry]:
        """The shards that an index.json names, in its order: url → entry. `listed`: what there is below the prefix."""
        try:
            content = json.loads(data)
            if content["version"] != 2:
                raise FormatError(f"{url}: an index of version {content['version']!r}; this reader knows 2", url=url)
            shards = content["shards"]
            named = [self._entry(url, number, shard, listed) for number, shard in enumerate(shards)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(
                f"{url}: not an index of MDS shards: {type(error).__name__}: {error}",
                advice="it is written by MDSWriter as the last thing; write the data set again",
                url=url,
            ) from error
        if len(dict(named)) != len(named):
            raise FormatError(f"{url}: names a shard twice", advice="merge the indices again", url=url)
        return dict(named)

    def _entry(
        self, url: str, number: int, shard: dict[str, Any], listed: Mapping[str, ObjectInfo]
    ) -> tuple[str, Entry]:
        where = f"{url}: shard {number}"
        if shard["format"] != "mds" or shard["version"] != 2:
            raise FormatError(
                f"{where} is {shard['format']!r} of version {shard['version']!r}; only 'mds' of version 2 is read",
                advice="write it with MDSWriter",
                url=url,
            )
        schema = self._schema(where, url, shard)
        num_samples = _count(shard["samples"])
        raw, packed = shard["raw_data"], shard["zip_data"]
        raw_bytes = _count(raw["bytes"])
        directory = url.rpartition("/")[0]
        for stored, codec in ((raw, None), (packed, _codec(shard["compression"]) if packed else None)):
            if not stored:
                continue
            name = stored["basename"]
            if not isinstance(name, str) or name.startswith("/") or ".." in name.split("/"):
                raise FormatError(f"{where} lies outside of its data set, at {name!r}", url=url)
            found = listed.get(f"{directory}/{name}")
            if found is None:
                continue
            if found.size_bytes != _count(stored["bytes"]):
                raise FormatError(
                    f"{found.url}: {found.size_bytes:,} bytes, but {url} says {stored['bytes']:,}",
                    advice="the upload was cut short, or another data set was written over this one",
                    url=found.url,
                )
            return found.url, Entry(num_samples, raw_bytes, schema, codec)
        missing = (packed or raw)["basename"]
        raise FormatError(
            f"{directory}/{missing}: named by {url}, but not there",
            advice="upload the missing shard; index.json should be uploaded last",
            url=f"{directory}/{missing}",
        )

    def _schema(self, where: str, url: str, shard: dict[str, Any]) -> str:
        columns = list(
            zip(shard["column_names"], shard["column_encodings"], shard["column_sizes"], strict=True)
        )  # ValueError is caught
        for name, encoding, size in columns:
            try:
                self._decoder(encoding)
                expected = fixed_size(encoding)
            except ValueError as error:
                raise FormatError(f"{where}, column {name!r}: {error}", url=url) from error
            if size is not None and (_count(size) != size or (expected is not None and size != expected)):
                raise FormatError(f"{where}, column {name!r}: {encoding} of {size!r} bytes", url=url)
        if len({name for name, _, _ in columns}) != len(columns) or not all(isinstance(n, str) for n, _, _ in columns):
            raise FormatError(f"{where}: its columns are {[name for name, _, _ in columns]}", url=url)
        return json.dumps(columns, separators=(",", ":"))

    def index_entry(self, shard: Readable, entry: Entry) -> ShardIndex:
        """Where the samples lie: for a plain shard its table is read, for a compressed one nothing."""
        if entry.codec is not None:
            return _index(entry.schema, entry.codec, offsets=[0], lengths=[shard.size], unit_sizes=[entry.num_samples])
        head = shard.read(0, min(shard.size, 4 * (entry.num_samples + 2)))
        ends = _offsets(head, shard.size, entry, shard.url)
        return _index(entry.schema, None, offsets=ends[:-1], lengths=np.diff(ends))

    # -- samples --

    def is_unit(self, extension: str) -> bool:
        return not extension.startswith("mds:")

    def unpack(self, extension: str, data: bytes) -> dict[str, Any]:
        """One sample's columns. Raises ValueError if its bytes are not those of its columns."""
        return _Columns.of(extension.partition(":")[2], self.allow_pickle, self.decode_images).read(data)

    def open_unit(self, shard: Readable, extension: str, offset: int, length: int) -> MdsUnit:
        """All samples of a compressed shard. Raises FormatError."""
        kind, _, schema = extension.partition(":")
        raw = decompress(
            shard.read(offset, length), kind.removeprefix("mds+"), url=shard.url, max_bytes=MAX_SHARD_BYTES
        )
        return MdsUnit(raw, shard.url, _Columns.of(schema, self.allow_pickle, self.decode_images))

    def _decoder(self, encoding: str) -> Decoder:
        return decoder_for(encoding, allow_pickle=self.allow_pickle, decode_images=self.decode_images)


class MdsUnit:
    """A compressed shard, unpacked in memory."""

    def __init__(self, raw: bytes, url: str, columns: _Columns) -> None:
        if len(raw) < 8:
            raise FormatError(f"{url}: {len(raw)} bytes when decompressed: not a shard", url=url)
        entry = Entry(int.from_bytes(raw[:4], "little"), len(raw), "", None)
        self._ends = _offsets(raw[: 4 * (entry.num_samples + 2)], len(raw), entry, url)
        self._raw, self._columns = raw, columns
        self.num_samples = entry.num_samples
        self.size_bytes = len(raw)

    def sample(self, number: int) -> dict[str, Any]:
        return self._columns.read(self._raw[int(self._ends[number]) : int(self._ends[number + 1])])


class _Columns:
    """Cuts a sample into its columns."""

    _known: ClassVar[dict[tuple[str, bool, bool], _Columns]] = {}

    def __init__(self, schema: str, allow_pickle: bool, decode_images: bool) -> None:
        self._columns = [
            (name, decoder_for(encoding, allow_pickle=allow_pickle, decode_images=decode_images), size or None)
            for name, encoding, size in json.loads(schema)
        ]
        self._num_sizes = sum(size is None for _, _, size in self._columns)

    @classmethod
    def of(cls, schema: str, allow_pickle: bool, decode_images: bool) -> _Columns:
        key = (schema, allow_pickle, decode_images)
        found = cls._known.get(key)
        if found is None:
            found = cls._known[key] = cls(*key)
        return found

    def read(self, data: bytes) -> dict[str, Any]:
        at = 4 * self._num_sizes
        if len(data) < at:
            raise ValueError(f"a sample of {len(data)} bytes, of which {at} should say the sizes of its columns")
        sizes = iter(struct.unpack_from(f"<{self._num_sizes}I", data))
        values: dict[str, Any] = {}
        for name, decode, size in self._columns:
            end = at + (next(sizes) if size is None else size)
            if end > len(data):
                raise ValueError(f"column {name!r} ends at {end} of a sample of {len(data)} bytes")
            try:
                values[name] = decode(data[at:end])
            except ValueError as error:
                raise ValueError(f"column {name!r}: {error}") from error
            at = end
        if at != len(data):
            raise ValueError(f"its columns have {at} of its {len(data)} bytes")
        return values


def _offsets(head: bytes, size_bytes: int, entry: Entry, url: str) -> Ints:
    """Where each sample begins, and where the last one ends. Raises FormatError for a table that cannot be right."""

    def refuse(message: str, offset: int) -> FormatError:
        return FormatError(
            f"{url}: {message} (byte {offset})", advice="write or upload this shard again", url=url, offset=offset
        )

    if size_bytes != entry.raw_bytes:
        raise refuse(f"{size_bytes:,} bytes, but index.json says {entry.raw_bytes:,}", min(size_bytes, entry.raw_bytes))
    expected = 4 * (entry.num_samples + 2)
    if len(head) < expected:
        raise refuse(f"cut short: the table of {entry.num_samples:,} samples has {expected:,} bytes", len(head))
    table = np.frombuffer(head, "<u4").astype(np.int64)
    if int(table[0]) != entry.num_samples:
        raise refuse(f"{int(table[0]):,} samples, but index.json says {entry.num_samples:,}", 0)
    ends = table[1:]
    if int(ends[0]) < expected or int(ends[-1]) != size_bytes or bool((np.diff(ends) < 0).any()):
        raise refuse("its table of samples does not fit its size", 4)
    return ends


def _index(schema: str, codec: str | None, *, offsets: Any, lengths: Any, unit_sizes: Any = None) -> ShardIndex:
    num = len(offsets)
    return ShardIndex(
        key_lengths=np.zeros(num, dtype=np.int64),
        key_bytes=b"",
        member_counts=np.ones(num, dtype=np.int64),
        offsets=np.asarray(offsets, dtype=np.int64),
        lengths=np.asarray(lengths, dtype=np.int64),
        extensions=(f"mds:{schema}" if codec is None else f"mds+{codec}:{schema}",),
        extension_ids=np.zeros(num, dtype=np.int32),
        unit_sizes=None if unit_sizes is None else np.asarray(unit_sizes, dtype=np.int64),
    )


def _codec(compression: object) -> str:
    """`zstd:7` → `zstd`."""
    codec = compression.partition(":")[0] if isinstance(compression, str) else ""
    if codec not in CODECS:
        raise ValueError(f"compression {compression!r} is none of {', '.join(CODECS)}")
    return codec


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value <= MAX_SHARD_BYTES:
        raise ValueError(f"{value!r} is not a size of an MDS shard")
    return value
