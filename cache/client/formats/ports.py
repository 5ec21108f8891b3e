"""The port to shard formats: a format says which objects are shards, and where the samples lie in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from cache.client.formats.index import SampleIndex, ShardIndex

if TYPE_CHECKING:
    from cache.origin.ports import ObjectInfo


class Readable(Protocol):
    """An opened object, as `Cache.open` gives it."""

    @property
    def url(self) -> str: ...

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes:
        """The bytes [offset, offset + length); fewer only at the end of the object."""
        ...


class ShardFormat(Protocol):
    """One layout of samples in objects. Small, picklable, without state: an instance travels to DataLoader workers.

    A format may have two attributes more. `index_version: int`: its indices are kept beside the cache and read from beside the shards
    (formats/pack.py); raise it when `index` answers otherwise than before. Its `repr` must then name every setting that changes the answer.
    `walks_shards: bool`: `index` reads from one end to the other, so what lies ahead of it is fetched meanwhile.
    """

    def accepts(self, url: str) -> bool:
        """Whether an object that was found below a prefix is a shard of this format, by its name."""
        ...

    def index(self, shard: Readable) -> ShardIndex:
        """Where the samples of this shard lie. Reads no more than it must. Raises FormatError naming url and offset."""
        ...


@runtime_checkable
class ListedFormat(Protocol):
    """A format whose index follows from the listing: nothing is opened, however many objects there are."""

    def accepts(self, url: str) -> bool: ...

    def index_listing(self, root_url: str, objects: Sequence[ObjectInfo]) -> SampleIndex:
        """Where the samples of these objects lie; `root_url` is the prefix below which they were found."""
        ...


@runtime_checkable
class ManifestFormat(Protocol):
    """A format whose shards are those that an object beside them names, in its order."""

    @property
    def manifest_name(self) -> str: ...

    def accepts(self, url: str) -> bool:
        """Whether this is the name of a manifest."""
        ...

    def read_manifest(self, url: str, data: bytes, listed: Mapping[str, ObjectInfo]) -> Mapping[str, Any]:
        """Url of each shard → what the manifest says of it. Raises FormatError."""
        ...

    def index_entry(self, shard: Readable, entry: Any) -> ShardIndex:
        """Where the samples of this shard lie. Raises FormatError, also where shard and manifest disagree."""
        ...


class Unit(Protocol):
    """Samples that can only be read together, unpacked in memory."""

    @property
    def num_samples(self) -> int: ...

    @property
    def size_bytes(self) -> int:
        """What it takes of memory, more or less."""
        ...

    def sample(self, number: int) -> dict[str, Any]:
        """One of them, by its place in the unit. Raises ValueError for bytes that are not a sample. Any thread may call."""
        ...


@runtime_checkable
class ValueFormat(Protocol):
    """A format whose samples are values of named columns, not files: it says itself what its bytes mean."""

    def is_unit(self, extension: str) -> bool:
        """Whether members of this name are units."""
        ...

    def unpack(self, extension: str, data: bytes) -> dict[str, Any]:
        """The columns of a sample that is stored by itself. Raises ValueError."""
        ...

    def open_unit(self, shard: Readable, extension: str, offset: int, length: int) -> Unit:
        """Reads and unpacks the unit that has this member first. Raises FormatError."""
        ...
