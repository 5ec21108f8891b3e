"""Torch data sets over shards: map-style, so that any sampler, any number of workers and any order work.

    dataset = ShardDataset(Cache(), "s3://bucket/train", TarFormat(), decode=my_decode)
    sampler = ElasticBatchSampler(dataset, global_batch_size=256)
    loader = ElasticLoader(dataset, sampler)

With the cache's daemon, reading a resident sample is one pread of a local file (about 10 µs), so that no DataLoader
worker is needed to hide I/O; use workers if *decoding* is expensive. A data set may be forked, pickled, and read from
any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from cache.client.client import Cache
from cache.client.formats.index import Described, Ints, SampleIndex
from cache.client.formats.ports import Unit, ValueFormat
from cache.client.formats.tokens import TokenFormat
from cache.client.handles import OpenShards
from cache.client.indexing import AnyFormat, build_index
from cache.client.members import Members, RawSample
from cache.client.stats import ReaderStats
from cache.client.units import DEFAULT_MAX_BYTES, Units
from cache.daemon import wire
from cache.errors import FormatError
from cache.origin.urls import canonical_url

Decode = Callable[[RawSample], Any]


Asked = tuple[int, int, Described]
"""A sample that is to be read: its number, its shard's, and what the index says of it."""


class ShardDataset(Dataset[Any]):
    """The samples of all shards below some urls, numbered from 0 in the order of the shards.

    `urls`: a prefix, an object, or several. `shard_format`: TarFormat(), MdsFormat(), ParquetFormat(), RawFormat(),
    TokenFormat(seq_len). `decode`: what is stored to what the model eats; without one, samples are dictionaries. It must be
    picklable for spawned workers. `unpacked_bytes`: room in each process's memory for what can only be unpacked together (row
    groups of Parquet, compressed MDS shards). `zero_copy`: members are read-only memoryviews of the cache's files, not bytes: faster
    for large members; `decode` must not keep them (their files stay on the disk), and a disk that fails under them ends the process
    (SIGBUS, as with any memory map). Building one reads the headers of all shards. Raises FormatError, ObjectNotFound and the
    origin's errors.
    """

    def __init__(
        self,
        cache: Cache,
        urls: str | Sequence[str],
        shard_format: AnyFormat,
        decode: Decode | None = None,
        *,
        unpacked_bytes: int = DEFAULT_MAX_BYTES,
        zero_copy: bool = False,
    ) -> None:
        report = build_index(cache, urls, shard_format)
        self.cache = cache
        self.index: SampleIndex = report.index
        self.decode = decode
        self.resident_bytes_at_open = report.resident_bytes
        self._values: ValueFormat | None = shard_format if isinstance(shard_format, ValueFormat) else None
        self._unpacked_bytes = unpacked_bytes
        self._zero_copy = zero_copy
        self._begin()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, sample: int) -> Any:
        return self.__getitems__([sample])[0]

    def __getitems__(self, samples: Sequence[int]) -> list[Any]:
        """Several samples at once, in the order asked; torch's DataLoader calls this with a whole batch."""
        if self._members is not None:
            samples = [int(sample) for sample in samples]
            if samples and not 0 <= min(samples) <= max(samples) < self._size:
                raise IndexError(f"samples {min(samples)}..{max(samples)} of a data set of {len(self)}")
            raws = self._members.fetch(samples)
            return raws if self.decode is None else self._decoded_each(raws, self.decode)
        numbers = np.asarray(samples, dtype=np.int64)
        if numbers.size and (int(numbers.min()) < 0 or int(numbers.max()) >= len(self)):
            raise IndexError(f"samples {numbers.min()}..{numbers.max()} of a data set of {len(self)}")
        # In the order in which they lie: neighbours share blocks, and a reader past the daemon fetches windows.
        shards = self.index.shard_of(numbers)
        order = np.lexsort((numbers, shards))
        numbers, shard_idxs = numbers[order], shards[order].tolist()
        described = self.index.described(numbers)
        asked = list(zip(numbers.tolist(), shard_idxs, described, strict=True))
        fetched: list[Any] = [None] * len(asked)
        for place, raw in zip(order.tolist(), self._fetch_values(numbers, asked), strict=True):
            fetched[place] = raw
        return fetched if self.decode is None else self._decoded_each(fetched, self.decode)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples in each part that is fetched together, which a bounded shuffle permutes: a shard, or a row group of Parquet."""
        return self.index.shard_sizes if self.index.part_sizes is None else self.index.part_sizes

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, sorted, where the layout names them (RawFormat); a sample's `cls` is an index into
        it."""
        return self.index.classes

    @property
    def etags(self) -> Mapping[str, str]:
        """Url → etag of each shard, as it was listed."""
        return self.index.etags

    def visits(self, samples: Ints) -> tuple[list[tuple[str, int, int]], Ints]:
        """What reading these samples will touch, for `Stream.announce`: see SampleIndex.visits."""
        return self.index.visits(samples)

    def outlined_objects(self) -> bytes | None:
        """See Visitable; None for so many objects that the daemon would spend more memory on them than it saves anybody."""
        if len(self.index.shards) > wire.MAX_OUTLINED or len(self.shard_sizes) > wire.MAX_OUTLINED:
            return None
        parts = self.index.parts()
        if parts is None:
            return None
        shards = [(canonical_url(shard.url), shard.etag, shard.size_bytes) for shard in self.index.shards]
        return wire.pack_outlined(shards, parts)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_shards", "_units", "_members")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def _begin(self) -> None:
        """What a process has for itself."""
        self._size = len(self.index)
        self._shards = OpenShards(self.cache, self.index.shards)
        self._units = Units(self._unpacked_bytes)
        self._members = (
            Members(self.cache, self.index, self._shards, zero_copy=self._zero_copy) if self._values is None else None
        )

    def _fetch_values(self, numbers: Ints, asked: list[Asked]) -> list[RawSample]:
        """Columns, as the format makes them of what is stored."""
        stats = self.cache.stats()
        misses = stats.misses
        raws = []
        for sample in asked:
            raws.append(self._unpacked(*sample))
            if stats.misses != misses:
                self._prefetch(numbers[len(raws) :], asked[len(raws) :])
                stats, misses = ReaderStats(), 0
        return raws

    def _unpacked(self, sample: int, shard_idx: int, described: Described) -> RawSample:
        values = self._values
        assert values is not None
        shard = self.index.shards[shard_idx]
        extension, offset, length = described.members[0]
        try:
            if values.is_unit(extension):
                unit_idx = int(self.index.unit_of(np.array([sample]))[0])

                def unpack() -> Unit:
                    unit = values.open_unit(self._shards.get(shard_idx), extension, offset, length)
                    if unit.num_samples != self.index.unit_size(unit_idx):
                        raise ValueError(f"{unit.num_samples} samples instead of {self.index.unit_size(unit_idx)}")
                    return unit

                unit = self._units.get((shard_idx, unit_idx), unpack)
                columns = unit.sample(sample - self.index.first_sample_of(unit_idx))
            else:
                columns = values.unpack(extension, self._shards.get(shard_idx).read(offset, length))
        except ValueError as error:
            raise FormatError(
                f"{shard.url}: sample {described.key}: {error} (byte {offset:,})",
                advice="write or upload this shard again",
                url=shard.url,
                offset=offset,
            ) from error
        return {**columns, "__key__": described.key, "__url__": shard.url, "__index__": sample}

    def _prefetch(self, numbers: Ints, asked: list[Asked]) -> None:
        """A unit is asked for once, however many of its samples are among these."""
        for first in np.unique(self.index.unit_of(numbers), return_index=True)[1].tolist():
            _, shard_idx, described = asked[first]
            handle = self._shards.get(shard_idx)
            for offset, length in described.spans:
                handle.prefetch(offset, length)

    def _decoded_each(self, raws: list[RawSample], decode: Decode) -> list[Any]:
        decoded = []
        for raw in raws:
            try:
                decoded.append(decode(raw))
            except Exception as error:
                error.add_note(
                    f"while decoding sample {raw['__key__']!r} (number {raw['__index__']}) of {raw['__url__']}"
                )
                raise
        return decoded


class TokenDataset(ShardDataset):
    """Windows of tokens for language models: a sample is (inputs, targets), int64 tensors of `seq_len`, targets one
    token ahead.

    Windows begin every `seq_len` tokens and stay within a shard (see TokenFormat), so an epoch predicts every token
    once.
    """

    def __init__(self, cache: Cache, urls: str | Sequence[str], seq_len: int, decode: Decode | None = None) -> None:
        super().__init__(cache, urls, TokenFormat(seq_len), decode or window_to_tensors)


def window_to_tensors(raw: RawSample) -> tuple[torch.Tensor, torch.Tensor]:
    """A window's bytes as (inputs, targets)."""
    ((dtype, data),) = ((name, data) for name, data in raw.items() if not name.startswith("__"))
    tokens = torch.from_numpy(np.frombuffer(data, dtype=dtype).astype(np.int64))
    return tokens[:-1], tokens[1:]
