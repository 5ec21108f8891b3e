"""The port to shard formats: a format says which objects are shards, and where the samples lie in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

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
