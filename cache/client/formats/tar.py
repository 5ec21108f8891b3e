"""Tar archives in the WebDataset layout: `a/0017.png` and `a/0017.cls` are the members `png` and `cls` of the sample
`a/0017`.

Only headers are read. What is understood: ustar with prefix, old (v7) headers, GNU long names, PAX headers (local and
global; path and size), base-256 sizes. What is skipped, with a reason: directories, links, devices, sparse files,
hidden files, names without an extension. What is refused with a FormatError: a compressed archive, a broken header,
data that ends early, two members of a sample with the same extension.

Two deliberate differences from WebDataset's reader. Members of a key are brought together wherever they lie in the
archive, where WebDataset makes a new (broken) sample of each stretch: random access has no need of adjacency. And an
archive without its end marker is refused, because a shard that was cut at a member's end otherwise loses its last
samples in silence.

Sources: POSIX.1-2017 pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cache.client.formats.index import ShardIndex, pack_keys
from cache.client.formats.ports import Readable
from cache.client.formats.tarheaders import Entry, entries


@dataclass(frozen=True)
class TarFormat:
    """Tar shards; see the module's docstring for the layout."""

    suffix: str = ".tar"
    """Objects below a prefix whose name ends so are shards."""
    require_end_marker: bool = True
    """False accepts archives that were written without the two zero blocks at the end; a truncated one may then go
    unnoticed."""
    index_version: ClassVar[int] = 1
    walks_shards: ClassVar[bool] = True

    def accepts(self, url: str) -> bool:
        return url.endswith(self.suffix)

    def index(self, shard: Readable) -> ShardIndex:
        samples: dict[str, dict[str, Entry]] = {}
        skipped: list[tuple[str, str]] = []
        for entry in entries(shard, require_end_marker=self.require_end_marker):
            reason = entry.reason_to_skip or reason_to_skip_name(entry.name)
            if reason:
                skipped.append((entry.name, reason))
                continue
            key, extension = split_key(entry.name)
            members = samples.setdefault(key, {})
            if extension in members:
                raise entry.error(
                    f"sample {key!r} has two members {extension!r}, at {members[extension].offset} and {entry.offset}",
                    "give each sample a name of its own: the path up to the first dot of the file name is its key",
                )
            members[extension] = entry
        return _pack(samples, skipped)


def split_key(name: str) -> tuple[str, str]:
    """A member's path as (key of the sample, extension): cut at the first dot of the file name, the extension in
    lower case.

    >>> split_key("train/0017.seg.PNG")
    ('train/0017', 'seg.png')
    >>> split_key("v1.2/0017.png")
    ('v1.2/0017', 'png')
    """
    directory, slash, file_name = name.rpartition("/")
    stem, _, extension = file_name.partition(".")
    return f"{directory}{slash}{stem}", extension.lower()


def reason_to_skip_name(name: str) -> str:
    """Why a file of this name is not a member of any sample; empty if it is one."""
    file_name = name.rpartition("/")[2]
    if file_name.startswith("."):
        return "hidden file"
    if "." not in file_name:
        return "no extension"
    if name.startswith("__") and name.endswith("__"):
        return "WebDataset metadata"
    return ""


def _pack(samples: dict[str, dict[str, Entry]], skipped: list[tuple[str, str]]) -> ShardIndex:
    extensions: dict[str, int] = {}
    offsets: list[int] = []
    lengths: list[int] = []
    extension_ids: list[int] = []
    for members in samples.values():
        for extension, entry in members.items():
            offsets.append(entry.offset)
            lengths.append(entry.size)
            extension_ids.append(extensions.setdefault(extension, len(extensions)))
    key_lengths, key_bytes = pack_keys([key.encode("utf-8", "surrogateescape") for key in samples])
    return ShardIndex(
        key_lengths=key_lengths,
        key_bytes=key_bytes,
        member_counts=np.array([len(members) for members in samples.values()], dtype=np.int64),
        offsets=np.array(offsets, dtype=np.int64),
        lengths=np.array(lengths, dtype=np.int64),
        extensions=tuple(extensions),
        extension_ids=np.array(extension_ids, dtype=np.int32),
        skipped=tuple(skipped),
    )
