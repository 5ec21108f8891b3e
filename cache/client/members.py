"""Samples whose members are files, read as they are stored: the way of every resident sample into a batch, so each microsecond counts.

A batch is looked up without numpy: each of its operations takes a microsecond and more, whatever there is to look up, and a batch would
take some thirty of them; a look at one number through a memoryview of the same array takes 40 ns, and a sample takes eight or ten.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.client.client import Cache
from cache.client.formats.index import SampleIndex
from cache.client.handles import OpenShards
from cache.client.stats import ReaderStats

RawSample = dict[str, Any]
"""What `decode` is given: each member's bytes under its extension ("png", "cls"), or each column's value under its name (MDS,
Parquet), and `__key__`, `__url__`, `__index__`."""

Piece = tuple[int, int]
"""(offset, length) in a shard."""

Data = bytes | memoryview


class Members:
    """Of one process (it cannot be pickled); any thread may call. For indices without units."""

    def __init__(self, cache: Cache, index: SampleIndex, shards: OpenShards, *, zero_copy: bool) -> None:
        self._cache = cache
        self._index = index
        self._shards = shards
        self._zero_copy = zero_copy
        self._urls = [shard.url for shard in index.shards]
        self._sample_starts: list[int] = index.sample_starts.tolist()
        self._member_starts = _numbers(index.member_starts)
        self._offsets = _numbers(index.offsets)
        self._lengths = _numbers(index.lengths)
        self._extension_ids = _numbers(index.extension_ids)
        self._key_starts = _numbers(index.key_starts)
        starts, offsets, lengths = index.spans_of_samples
        self._span_starts, self._span_offsets, self._span_lengths = (
            _numbers(starts),
            _numbers(offsets),
            _numbers(lengths),
        )

    def fetch(self, samples: Sequence[int]) -> list[RawSample]:
        """The samples, in the order asked. First all that is to be read, then the reads, then the samples: large reads drive everything
        else out of the processor's caches, so little else is done between them."""
        # Read in the order in which they lie: neighbours share blocks, and a reader past the daemon fetches windows.
        order = sorted(range(len(samples)), key=samples.__getitem__)
        sample_starts, span_starts = self._sample_starts, self._span_starts
        shard_idxs = [bisect_right(sample_starts, samples[place]) - 1 for place in order]
        handles = self._shards.get_each(shard_idxs)
        reads: list[Callable[[int, int], Data]]
        if self._zero_copy:
            reads = [handle.view for handle in handles]
        else:
            reads = [handle.read for handle in handles]
        pieces: list[list[Piece]] = []
        for place in order:
            sample = samples[place]
            first, end = span_starts[sample], span_starts[sample + 1]
            if end - first == 1:
                pieces.append([(self._span_offsets[first], self._span_lengths[first])])
            else:
                pieces.append([(self._span_offsets[span], self._span_lengths[span]) for span in range(first, end)])
        stats = self._cache.stats()
        misses = stats.misses
        data: list[list[Data]] = []
        for read, spans in zip(reads, pieces, strict=True):
            data.append([read(start, length) for start, length in spans])
            if stats.misses != misses:
                # Something was not resident: the rest of the batch is asked for now, so that the waiting times overlap.
                for handle, later in zip(handles[len(data) :], pieces[len(data) :], strict=True):
                    for offset, length in later:
                        handle.prefetch(offset, length)
                stats, misses = ReaderStats(), 0
        fetched: list[RawSample] = [{}] * len(order)
        for place, shard_idx, spans, read_ in zip(order, shard_idxs, pieces, data, strict=True):
            fetched[place] = self._sample(samples[place], shard_idx, spans, read_)
        return fetched

    def _sample(self, sample: int, shard_idx: int, spans: list[Piece], data: list[Data]) -> RawSample:
        """A sample out of the pieces that hold its members."""
        first_key, end_key = self._key_starts[sample], self._key_starts[sample + 1]
        key = (
            self._index.key_bytes[first_key:end_key].decode("utf-8", "surrogateescape")
            if end_key > first_key
            else str(sample - self._sample_starts[shard_idx])
        )
        raw: RawSample = {"__key__": key, "__url__": self._urls[shard_idx], "__index__": sample}
        first, end = self._member_starts[sample], self._member_starts[sample + 1]
        extensions = self._index.extensions
        if end - first == 1:
            raw[extensions[self._extension_ids[first]]] = data[0]
        else:
            for member in range(first, end):
                offset, length = self._offsets[member], self._lengths[member]
                for (start, size), piece in zip(spans, data, strict=True):
                    if start <= offset and offset + length <= start + size:
                        is_whole = size == length
                        raw[extensions[self._extension_ids[member]]] = (
                            piece if is_whole else piece[offset - start : offset - start + length]
                        )
                        break
        if self._index.class_ids is not None:
            raw["cls"] = str(self._index.class_ids[sample]).encode()
        return raw


def _numbers(array: NDArray[Any]) -> memoryview[int]:
    """An array as something whose elements cost little one by one."""
    return np.ascontiguousarray(array).data
