"""Parquet files, read where they lie: a row is a sample, a row group the unit that is fetched and decoded together.

Only footers are read for the index; pyarrow decodes row groups from the cache's local ranges. Values come as Python's, lists of numbers as
numpy arrays. Directories of Hive partitions are read as the files that they hold: what only a directory's name says is not in the samples.

What is refused with a FormatError: a footer that cannot be read or points outside of its file, encrypted files, a column that is asked for
and not there, a page whose checksum (where it has one) is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache.client.formats.index import MAX_GAP_BYTES, ShardIndex
from cache.client.formats.parquet_footer import Footer, Group, parse_footer
from cache.client.formats.ports import Readable
from cache.client.seeking import SeekingFile
from cache.errors import CacheError, FormatError

_ROWS = "parquet"
_FOOTER = "parquet-footer"
_TAIL_BYTES = 8
_MAX_FOOTER_BYTES = 512 * 1024 * 1024
_THRIFT_LIMITS = {"thrift_string_size_limit": 256 * 1024 * 1024, "thrift_container_size_limit": 16 * 1024 * 1024}


@dataclass(frozen=True)
class ParquetFormat:
    """Parquet files; see the module's docstring."""

    columns: tuple[str, ...] | None = None
    """Only these columns, so only their bytes; None: all. Names as pyarrow takes them, `a.b` for a field of a struct."""
    suffix: str = ".parquet"
    """Objects below a prefix whose name ends so are shards, unless the name begins with `_` or `.`."""
    index_version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.columns is not None and (not self.columns or not isinstance(self.columns, tuple)):
            raise ValueError(f"columns={self.columns!r}: a tuple of at least one name, or None for all")

    def accepts(self, url: str) -> bool:
        return url.endswith(self.suffix) and not url.rpartition("/")[2].startswith(("_", "."))

    def index(self, shard: Readable) -> ShardIndex:
        """Where the row groups lie. Reads the footer only."""
        footer, footer_start, _ = _footer(shard)
        offsets: list[int] = []
        lengths: list[int] = []
        names: list[int] = []
        counts: list[int] = []
        sizes: list[int] = []
        for group in footer.groups:
            if not group.num_rows:
                continue
            spans = [*self._spans(shard, footer, group, footer_start), (footer_start, shard.size)]
            offsets += [start for start, _ in spans]
            lengths += [end - start for start, end in spans]
            names += [0] * (len(spans) - 1) + [1]
            counts.append(len(spans))
            sizes.append(group.num_rows)
        if sum(sizes) != footer.num_rows:
            rows = f"its row groups have {sum(sizes):,} rows, the file says {footer.num_rows:,}"
            raise _refused(shard.url, rows, footer_start)
        return ShardIndex(
            key_lengths=np.zeros(len(counts), dtype=np.int64),
            key_bytes=b"",
            member_counts=np.array(counts, dtype=np.int64),
            offsets=np.array(offsets, dtype=np.int64),
            lengths=np.array(lengths, dtype=np.int64),
            extensions=(_ROWS, _FOOTER),
            extension_ids=np.array(names, dtype=np.int32),
            unit_sizes=np.array(sizes, dtype=np.int64),
        )

    def is_unit(self, extension: str) -> bool:
        return True

    def unpack(self, extension: str, data: bytes) -> dict[str, Any]:
        raise ValueError("a row of Parquet is not stored by itself")

    def open_unit(self, shard: Readable, extension: str, offset: int, length: int) -> RowGroup:
        """The row group whose first byte of the chosen columns is at `offset`. Raises FormatError."""
        footer, footer_start, ending = _footer(shard)
        for number, group in enumerate(footer.groups):
            if group.num_rows and self._spans(shard, footer, group, footer_start)[0][0] == offset:
                return self._read(shard, ending, number, group.num_rows, offset)
        raise _refused(shard.url, "no row group begins here", offset)

    def _read(self, shard: Readable, ending: bytes, number: int, num_rows: int, offset: int) -> RowGroup:
        """Whatever pyarrow raises for bytes that it cannot read is a FormatError; what reading itself raises stays what it is."""
        try:
            # The footer is parsed out of memory; of the file nothing but the columns is read.
            metadata = pq.ParquetFile(pa.BufferReader(b"PAR1" + ending), **_THRIFT_LIMITS).metadata
            source = pa.PythonFile(_File(shard), mode="r")
            file = pq.ParquetFile(source, metadata=metadata, page_checksum_verification=True, **_THRIFT_LIMITS)
            table = file.read_row_group(number, columns=self.columns, use_threads=False)
            table.validate()
            if table.num_rows != num_rows:
                raise ValueError(f"{table.num_rows} rows instead of {num_rows}")
        except CacheError:
            raise
        except (pa.ArrowException, OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
            reason = " ".join(str(error).split())
            raise _refused(shard.url, f"row group {number} cannot be read: {reason}", offset) from error
        return RowGroup(table)

    def _spans(self, shard: Readable, footer: Footer, group: Group, footer_start: int) -> list[tuple[int, int]]:
        """Half-open ranges of the chosen columns of a row group; neighbours joined."""
        for name in self.columns or ():
            if not any(_is_within(path, name) for path in footer.paths):
                there = ", ".join(sorted(footer.paths)[:20])
                raise _refused(shard.url, f"it has no column {name!r}; there are {there}", footer_start)
        spans: list[tuple[int, int]] = []
        for chunk in sorted(group.chunks, key=lambda chunk: chunk.start):
            if self.columns is not None and not any(_is_within(chunk.path, name) for name in self.columns):
                continue
            if not 4 <= chunk.start <= chunk.end <= footer_start:
                where = f"column {chunk.path!r} should lie at [{chunk.start:,}, {chunk.end:,})"
                raise _refused(shard.url, f"{where} of a file of {shard.size:,} bytes", footer_start)
            if spans and chunk.start - spans[-1][1] <= MAX_GAP_BYTES:
                spans[-1] = (spans[-1][0], max(spans[-1][1], chunk.end))
            else:
                spans.append((chunk.start, chunk.end))
        if not spans:
            raise _refused(shard.url, "a row group of rows without columns", footer_start)
        return spans


class RowGroup:
    """A row group, decoded. Arrow's arrays are read by any thread."""

    def __init__(self, table: pa.Table) -> None:
        self._columns = list(zip(table.column_names, table.columns, strict=True))
        self.num_samples: int = table.num_rows
        self.size_bytes: int = table.nbytes

    def sample(self, number: int) -> dict[str, Any]:
        try:
            return {name: _value(column[number]) for name, column in self._columns}
        except (pa.ArrowException, OverflowError, TypeError) as error:
            raise ValueError(f"row {number} of its row group cannot be read: {error}") from error


def _value(scalar: Any) -> Any:
    """A scalar as Python's; a list of numbers without missing ones as an array, which costs no object per number."""
    values = getattr(scalar, "values", None)
    if isinstance(scalar, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar) and values is not None:
        kind = values.type
        if (pa.types.is_integer(kind) or pa.types.is_floating(kind)) and not values.null_count:
            return values.to_numpy(zero_copy_only=False)
    return scalar.as_py()


class _File(SeekingFile):
    """A shard as a file of Python's."""

    def __init__(self, shard: Readable) -> None:
        super().__init__(shard.size, shard.url)
        self._shard = shard

    def read(self, size: int | None = -1) -> bytes:
        rest = max(0, self.size - self.position)
        data = self._shard.read(self.position, rest if size is None or size < 0 else min(size, rest)) if rest else b""
        self.position += len(data)
        return data


def _footer(shard: Readable) -> tuple[Footer, int, bytes]:
    """The footer, where it begins, and its bytes to the end of the file."""
    if shard.size < _TAIL_BYTES + 4:
        raise _refused(shard.url, f"{shard.size} bytes are no Parquet file", 0)
    tail = shard.read(shard.size - _TAIL_BYTES, _TAIL_BYTES)
    if tail[4:] == b"PARE":
        raise _refused(shard.url, "its footer is encrypted", shard.size - 4)
    if tail[4:] != b"PAR1":
        raise _refused(shard.url, f"it ends with {tail[4:]!r}, not with b'PAR1'", shard.size - 4)
    length = int.from_bytes(tail[:4], "little")
    start = shard.size - _TAIL_BYTES - length
    if start < 4 or length > _MAX_FOOTER_BYTES:
        raise _refused(shard.url, f"a footer of {length:,} bytes in a file of {shard.size:,}", shard.size - _TAIL_BYTES)
    body = shard.read(start, length)
    try:
        return parse_footer(body), start, body + tail
    except ValueError as error:
        raise _refused(shard.url, f"its footer cannot be read: {error}", start) from error


def _is_within(path: str, name: str) -> bool:
    """Whether a column is the named one or a part of it."""
    return path == name or path.startswith(f"{name}.")


def _refused(url: str, message: str, offset: int) -> FormatError:
    return FormatError(
        f"{url}: {message} (byte {offset:,})", advice="write or upload this file again", url=url, offset=offset
    )
