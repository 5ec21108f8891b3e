"""Where each sample of a data set lies: a few arrays, whatever the number of samples.

A *sample* has *members* (the files of one key in a tar, a raw file, a window of tokens). Members that lie next to
each other are read together: such a piece is a *span*, and spans are also what is announced to the cache. No Python
object is kept per sample, so that ten million samples cost some hundred MB, and a forked DataLoader worker shares
them.

Where samples cannot be read one by one (a row group of Parquet, a compressed shard), many of them share one *unit*: members,
spans and visits are then those of the unit, kept once for all of its samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

MAX_GAP_BYTES = 64 * 1024
"""Members of a sample that are closer than this are read in one go: copying 64 KiB takes 10 µs, as long as a second
read."""


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard, in the order of their first member."""

    key_lengths: Ints
    key_bytes: bytes
    """Names of the samples as stored, one after the other; an empty one means the sample's number in the shard (see pack_keys)."""
    member_counts: Ints
    """Members of each sample; the arrays below hold the members of all samples, one sample after the other."""
    offsets: Ints
    lengths: Ints
    extensions: tuple[str, ...]
    extension_ids: NDArray[np.int32]
    """Each member's name within its sample, as an index into `extensions`."""
    skipped: tuple[tuple[str, str], ...] = ()
    """Entries of the shard that are not part of any sample: (name, reason)."""
    unit_sizes: Ints | None = None
    """Samples of each unit, at least one, where samples are stored in units; everything above is then per unit and not per sample."""

    @property
    def num_samples(self) -> int:
        return len(self.member_counts) if self.unit_sizes is None else int(self.unit_sizes.sum())


@dataclass(frozen=True)
class Shard:
    """One object of the data set, pinned at the etag that was listed."""

    url: str
    etag: str
    size_bytes: int


class Described(NamedTuple):
    """One sample."""

    key: str
    """Its name within its shard, as it is stored there; its number in the shard where it has none."""
    spans: list[tuple[int, int]]
    """(offset, length) of the pieces of the shard that hold it, or its unit."""
    members: list[tuple[str, int, int]]
    """(extension, offset, length) of each member, of it or its unit."""


@dataclass(frozen=True)
class SampleIndex:
    """All samples of a data set, numbered through its shards."""

    shards: tuple[Shard, ...]
    sample_starts: Ints
    """Shard i holds the samples [sample_starts[i], sample_starts[i + 1])."""
    member_starts: Ints
    """Sample (or unit) i has the members [member_starts[i], member_starts[i + 1])."""
    offsets: Ints
    lengths: Ints
    extensions: tuple[str, ...]
    extension_ids: NDArray[np.int32]
    key_starts: Ints
    """Key of sample (or unit) i: key_bytes[key_starts[i]:key_starts[i + 1]]; an empty key means the sample's number in its
    shard."""
    key_bytes: bytes
    classes: tuple[str, ...] = ()
    """Names of the classes, sorted, where the layout says a sample's class."""
    class_ids: NDArray[np.int32] | None = None
    num_skipped: int = 0
    skipped: tuple[tuple[str, str, str], ...] = ()
    """Some of the entries that belong to no sample: (url, name, reason)."""
    unit_starts: Ints | None = None
    """Unit i holds the samples [unit_starts[i], unit_starts[i + 1]); None where every sample is a unit of its own."""
    part_sizes: tuple[int, ...] | None = None
    """Samples of each part that is fetched together, for shuffles with a bounded working set: a shard, or a unit where a shard has
    units. None: the shards."""

    def __len__(self) -> int:
        return int(self.sample_starts[-1])

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples in each shard."""
        return tuple(np.diff(self.sample_starts).tolist())

    def unit_of(self, samples: Ints) -> Ints:
        """The unit of each of these samples, as the arrays count them."""
        if self.unit_starts is None:
            return samples
        return np.asarray(np.searchsorted(self.unit_starts, samples, side="right") - 1, dtype=np.int64)

    def first_sample_of(self, unit: int) -> int:
        return unit if self.unit_starts is None else int(self.unit_starts[unit])

    def unit_size(self, unit: int) -> int:
        """Samples that are stored together as this unit."""
        return 1 if self.unit_starts is None else int(self.unit_starts[unit + 1] - self.unit_starts[unit])

    @cached_property
    def etags(self) -> dict[str, str]:
        return {shard.url: shard.etag for shard in self.shards}

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards together."""
        return sum(shard.size_bytes for shard in self.shards)

    def shard_of(self, samples: Ints) -> Ints:
        """The shard of each of these samples."""
        return np.asarray(np.searchsorted(self.sample_starts, samples, side="right") - 1, dtype=np.int64)

    def key(self, sample: int) -> str:
        """The name of a sample within its shard, as it is stored there."""
        return self.described(np.array([sample], dtype=np.int64))[0].key

    def members(self, sample: int) -> list[tuple[str, int, int]]:
        """(extension, offset, length) of each member of a sample; of its unit, where it is stored in one."""
        return self.described(np.array([sample], dtype=np.int64))[0].members

    def described(self, samples: Ints) -> list[Described]:
        """All there is to know of each of these samples, in their order. A look at numpy arrays costs the same for one sample as for a
        batch, and more than reading a sample does: so a batch is looked up as one."""
        units = self.unit_of(samples)
        member_ends, members = _gather(self.member_starts, units)
        names = [self.extensions[number] for number in self.extension_ids[members].tolist()]
        each = list(zip(names, self.offsets[members].tolist(), self.lengths[members].tolist(), strict=True))
        starts, offsets, lengths = self._spans
        span_ends, spans = _gather(starts, units)
        pieces = list(zip(offsets[spans].tolist(), lengths[spans].tolist(), strict=True))
        shards = self.shard_of(samples)
        in_shard = (samples - self.sample_starts[shards]).tolist()
        keys = zip(self.key_starts[units].tolist(), self.key_starts[units + 1].tolist(), strict=True)
        found = []
        first_member = first_span = 0
        for place, (key_start, key_end) in enumerate(keys):
            # The name of a unit is none of its samples'.
            is_named = key_end > key_start and (self.unit_starts is None or self.unit_size(int(units[place])) == 1)
            name = self.key_bytes[key_start:key_end].decode("utf-8", "surrogateescape") if is_named else ""
            found.append(
                Described(
                    name or str(in_shard[place]),
                    pieces[first_span : span_ends[place]],
                    each[first_member : member_ends[place]],
                )
            )
            first_member, first_span = member_ends[place], span_ends[place]
        return found

    @cached_property
    def _spans(self) -> tuple[Ints, Ints, Ints]:
        """(span_starts, offsets, lengths): sample i is read by the spans [span_starts[i], span_starts[i + 1])."""
        num_members = len(self.offsets)
        opens = np.zeros(num_members, dtype=bool)
        opens[self.member_starts[:-1][np.diff(self.member_starts) > 0]] = True
        if num_members > 1:
            gaps = self.offsets[1:] - (self.offsets[:-1] + self.lengths[:-1])
            opens[1:] |= (gaps < 0) | (gaps > MAX_GAP_BYTES)
        firsts = np.flatnonzero(opens)
        lasts = np.append(firsts[1:], num_members) - 1
        offsets = self.offsets[firsts]
        lengths = self.offsets[lasts] + self.lengths[lasts] - offsets if num_members else offsets
        return np.searchsorted(firsts, self.member_starts).astype(np.int64), offsets, lengths

    def parts(self) -> list[tuple[int, int, int, int]] | None:
        """(shard, start, end, samples) of each part that shuffles permute, or None where parts are both shards and units."""
        if self.unit_starts is None or self.part_sizes is None:
            return [(i, 0, s.size_bytes, n) for i, (s, n) in enumerate(zip(self.shards, self.shard_sizes, strict=True))]
        starts, offsets, lengths = self._spans
        if len(self.part_sizes) != len(self.unit_starts) - 1 or (np.diff(starts) < 1).any():
            return None
        first = np.minimum.reduceat(offsets, starts[:-1]).tolist()
        end = np.maximum.reduceat(offsets + lengths, starts[:-1]).tolist()
        shards = self.shard_of(self.unit_starts[:-1]).tolist()
        return list(zip(shards, first, end, self.part_sizes, strict=True))

    @property
    def spans_of_samples(self) -> tuple[Ints, Ints, Ints]:
        """(span_starts, offsets, lengths): sample (or unit) i is read by the spans [span_starts[i], span_starts[i + 1])."""
        return self._spans

    def spans(self, sample: int) -> list[tuple[int, int]]:
        """(offset, length) of the pieces of the shard that hold a sample."""
        return self.described(np.array([sample], dtype=np.int64))[0].spans

    def visits(self, samples: Ints) -> tuple[list[tuple[str, int, int]], Ints]:
        """The future in the words of the cache: (url, offset, length) of every span of these samples, in their order,
        and how many spans each sample has. A unit is visited once, by the first of its samples among these: the others find
        it unpacked."""
        starts, offsets, lengths = self._spans
        units = self.unit_of(samples)
        counts = starts[units + 1] - starts[units]
        if self.unit_starts is not None:
            is_first = np.zeros(len(units), dtype=bool)
            is_first[np.unique(units, return_index=True)[1]] = True
            counts = np.where(is_first, counts, 0)
        # For every span to be visited, its number: the first of its sample, plus its place among the sample's spans.
        first_visit = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
        spans = np.repeat(starts[units] - first_visit, counts) + np.arange(int(counts.sum()))
        shards = np.repeat(self.shard_of(samples), counts)
        urls = [self.shards[shard].url for shard in shards.tolist()]
        return list(zip(urls, offsets[spans].tolist(), lengths[spans].tolist(), strict=True)), counts


def pack_keys(keys: Sequence[bytes]) -> tuple[Ints, bytes]:
    """Names of samples as ShardIndex keeps them.

    >>> lengths, data = pack_keys([b"a", b"bc"])
    >>> lengths.tolist(), data
    ([1, 2], b'abc')
    """
    return np.fromiter((len(key) for key in keys), dtype=np.int64, count=len(keys)), b"".join(keys)


def _gather(starts: Ints, rows: Ints) -> tuple[list[int], Ints]:
    """The elements of these rows, where row i has [starts[i], starts[i + 1]): where each row ends among them, and their numbers."""
    counts = starts[rows + 1] - starts[rows]
    ends = np.cumsum(counts)
    return ends.tolist(), np.repeat(starts[rows] - (ends - counts), counts) + np.arange(int(counts.sum()))


MAX_SKIPPED_KEPT = 1000
"""Of skipped entries, this many are kept with their reasons; all are counted."""


def join(shards: Sequence[Shard], indices: Sequence[ShardIndex]) -> SampleIndex:
    """One index over the samples of many shards, in their order."""
    extensions = sorted({extension for index in indices for extension in index.extensions})
    number = {extension: idx for idx, extension in enumerate(extensions)}
    renumbered = [
        np.array([number[extension] for extension in index.extensions], dtype=np.int32)[index.extension_ids]
        for index in indices
        if len(index.extension_ids)
    ]
    skipped = [(shard.url, *entry) for shard, index in zip(shards, indices, strict=True) for entry in index.skipped]
    has_units = any(index.unit_sizes is not None for index in indices)
    return SampleIndex(
        shards=tuple(shards),
        sample_starts=_starts([np.array([index.num_samples for index in indices], dtype=np.int64)]),
        member_starts=_starts([index.member_counts for index in indices]),
        offsets=_concatenate([index.offsets for index in indices]),
        lengths=_concatenate([index.lengths for index in indices]),
        extensions=tuple(extensions),
        extension_ids=np.concatenate([np.empty(0, dtype=np.int32), *renumbered]),
        key_starts=_starts([index.key_lengths for index in indices]),
        key_bytes=b"".join(index.key_bytes for index in indices),
        num_skipped=len(skipped),
        skipped=tuple(skipped[:MAX_SKIPPED_KEPT]),
        unit_starts=_starts([_unit_sizes(index) for index in indices]) if has_units else None,
        part_sizes=tuple(
            size
            for index in indices
            for size in ([index.num_samples] if index.unit_sizes is None else index.unit_sizes.tolist())
        )
        if has_units
        else None,
    )


def _unit_sizes(index: ShardIndex) -> Ints:
    return np.ones(len(index.member_counts), dtype=np.int64) if index.unit_sizes is None else index.unit_sizes


def _concatenate(arrays: Sequence[Ints]) -> Ints:
    return np.concatenate([np.empty(0, dtype=np.int64), *arrays])


def _starts(counts: Sequence[Ints]) -> Ints:
    return _concatenate([np.zeros(1, dtype=np.int64), np.cumsum(_concatenate(counts))])
