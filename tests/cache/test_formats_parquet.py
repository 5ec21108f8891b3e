"""Parquet files that pyarrow wrote: rows come as they were put in, only what is asked for is read, and a damaged file is refused, never
misread and never a crash."""

from __future__ import annotations

import datetime
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.cli import cli
from cache.client import Cache
from cache.client.datasets import ShardDataset
from cache.client.formats.index import MAX_GAP_BYTES, Shard, join
from cache.client.formats.parquet import ParquetFormat
from cache.client.indexing import build_index
from cache.client.loader import ElasticLoader
from cache.client.sampler import ElasticBatchSampler
from cache.errors import FormatError, OriginUnavailable
from tests.cache.stored import Stored
from tests.daemon import CacheDaemon

GROUP = 7
ROWS = 40


def row(number: int) -> dict[str, Any]:
    return {
        "number": number,
        "text": None if number % 5 == 0 else "é" * (number % 9),
        "image": {"bytes": np.random.default_rng(number).bytes(50 + number), "path": f"{number}.png"},
        "tokens": list(range(number, number + 3)),
        "ragged": [[number], []],
        "when": datetime.date(2026, 1, 1 + number % 28),
    }


def table(numbers: range) -> pa.Table:
    return pa.Table.from_pylist([row(number) for number in numbers])


def parquet(numbers: range, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(table(numbers), out, **{"row_group_size": GROUP, **options})
    return out.getvalue()


@pytest.fixture(scope="module")
def files_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("parquet")
    for number, compression in enumerate(["snappy", "zstd"]):
        numbers = range(number * ROWS, (number + 1) * ROWS)
        (root / f"part-{number}.parquet").write_bytes(parquet(numbers, compression=compression))
    (root / "_metadata").write_text("not a shard")
    (root / ".part-9.parquet").write_text("not a shard")
    return f"file://{root}"


@pytest.fixture
def cache() -> Iterator[Cache]:
    cache = Cache(socket="")
    yield cache
    cache.close()


def plain(raw: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in raw.items()
        if not key.startswith("__")
    }


def test_rows_are_those_that_were_written(cache: Cache, files_url: str) -> None:
    dataset = ShardDataset(cache, files_url, ParquetFormat())
    assert len(dataset) == 2 * ROWS
    wanted = [79, 0, 41, 5, 40]
    for number, raw in zip(wanted, dataset.__getitems__(wanted), strict=True):
        assert plain(raw) == row(number)
        assert raw["tokens"].dtype == np.int64, "a list of numbers is an array, not a list of objects"
        assert raw["__key__"] == str(number % ROWS) and raw["__index__"] == number


def test_row_groups_are_what_a_bounded_shuffle_permutes(cache: Cache, files_url: str) -> None:
    """A window of W is W row groups in memory, however large the files are."""
    dataset = ShardDataset(cache, files_url, ParquetFormat())
    assert dataset.shard_sizes == (GROUP, GROUP, GROUP, GROUP, GROUP, 5) * 2


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("shuffle", ["full", "windowed:2"])
def test_an_epoch_through_the_daemon_has_every_row_once(files_url: str, num_workers: int, shuffle: str) -> None:
    """Row groups are decoded in each process, by local reads: the store gives each byte once."""
    with CacheDaemon() as daemon:
        cache = Cache(daemon.socket)
        dataset = ShardDataset(cache, files_url, ParquetFormat(), decode=number_of)
        options: dict[str, Any] = {"num_workers": num_workers}
        if num_workers:
            options["multiprocessing_context"] = "fork"
        sampler = ElasticBatchSampler(dataset, 8, shuffle=shuffle)
        loader = ElasticLoader(dataset, sampler, collate_fn=list, **options)
        assert sorted(number for batch in loader for number in batch) == list(range(2 * ROWS))
        loader.close()
        size = sum(shard.size_bytes for shard in dataset.index.shards)
        assert daemon.status()["counters"]["fetched_bytes"] <= size
        assert daemon.status()["readers"].get("direct_bytes", 0) == 0
        cache.close()


def number_of(raw: dict[str, Any]) -> int:
    assert raw["image"] == row(raw["number"])["image"]
    return int(raw["number"])


def test_only_the_columns_that_are_asked_for_are_read() -> None:
    """A text column beside a hundred megabytes of images costs the text."""
    out = io.BytesIO()
    rng = np.random.default_rng(0)
    columns = {"a": list(range(20)), "blob": [rng.bytes(20_000) for _ in range(20)], "z": [f"{n}" for n in range(20)]}
    pq.write_table(pa.table(columns), out, compression="none")
    shard = Stored(out.getvalue(), "mem://b/0.parquet")
    few = ParquetFormat(columns=("a", "z"))
    index = few.index(shard)
    spans = join([Shard(shard.url, "e", shard.size)], [index]).spans(0)
    assert sum(length for _, length in spans) < MAX_GAP_BYTES < shard.size / 2
    shard.bytes_read = 0
    unit = few.open_unit(shard, "parquet", int(index.offsets[0]), int(index.lengths[0]))
    assert [unit.sample(number) for number in (0, 19)] == [{"a": 0, "z": "0"}, {"a": 19, "z": "19"}]
    assert shard.bytes_read < shard.size / 5


def test_a_field_of_a_struct_may_be_asked_for(cache: Cache, files_url: str) -> None:
    dataset = ShardDataset(cache, files_url, ParquetFormat(columns=("image.path", "number")))
    assert plain(dataset[3]) == {"image": {"path": "3.png"}, "number": 3}


def test_a_column_that_is_not_there_is_an_error_that_names_the_file(cache: Cache, files_url: str) -> None:
    with pytest.raises(FormatError, match=r"part-0\.parquet: it has no column 'nothing'"):
        ShardDataset(cache, files_url, ParquetFormat(columns=("number", "nothing")))
    with pytest.raises(ValueError, match="a tuple"):
        ParquetFormat(columns="number")  # type: ignore[arg-type]


def test_the_published_index_spares_the_footers(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "0.parquet").write_bytes(parquet(range(ROWS)))
    url = f"file://{tmp_path}"
    run = CliRunner().invoke(cli, ["index", "--format", "parquet", url], env={"RAILHEAD_CACHE_SOCKET": ""})
    assert run.exit_code == 0 and f"{ROWS} samples of 1 shards" in run.output, run.output
    report = build_index(cache, url, ParquetFormat())
    assert report.num_built == 0 and report.index.part_sizes == (GROUP,) * 5 + (5,)
    assert plain(ShardDataset(cache, url, ParquetFormat())[ROWS - 1]) == row(ROWS - 1)


def test_empty_row_groups_and_files_are_no_samples() -> None:
    out = io.BytesIO()
    with pq.ParquetWriter(out, pa.schema([("a", pa.int64())])) as writer:
        for numbers in ([], [1, 2], [], [3]):
            writer.write_table(pa.table({"a": pa.array(numbers, pa.int64())}))
    index = ParquetFormat().index(Stored(out.getvalue()))
    assert index.unit_sizes is not None and index.unit_sizes.tolist() == [2, 1]
    empty = io.BytesIO()
    pq.write_table(pa.table({"a": pa.array([], pa.int64())}), empty)
    assert ParquetFormat().index(Stored(empty.getvalue())).num_samples == 0


def test_what_reading_raises_stays_what_it_is() -> None:
    """The origin being away is not the file's fault, also when it happens below pyarrow."""

    class Failing(Stored):
        def read(self, offset: int, length: int) -> bytes:
            if offset < 1000:
                raise OriginUnavailable("the origin is away", url=self.url)
            return super().read(offset, length)

    shard = Failing(parquet(range(ROWS)))
    index = ParquetFormat().index(shard)
    with pytest.raises(OriginUnavailable):
        ParquetFormat().open_unit(shard, "parquet", int(index.offsets[0]), int(index.lengths[0]))


# --- damage ---------------------------------------------------------------------------------------------------------------------

WHOLE = parquet(range(ROWS), write_page_checksum=True)
FOOTER = len(WHOLE) - 8 - int.from_bytes(WHOLE[-8:-4], "little")


def rows_of(data: bytes) -> list[dict[str, Any]]:
    shard = Stored(data, "mem://b/0.parquet")
    parquet_format = ParquetFormat()
    index = parquet_format.index(shard)
    joined = join([Shard(shard.url, "e", shard.size)], [index])
    found = []
    for unit_start in joined.unit_starts[:-1].tolist() if joined.unit_starts is not None else []:
        extension, offset, length = joined.members(unit_start)[0]
        unit = parquet_format.open_unit(shard, extension, offset, length)
        found += [plain(unit.sample(number)) for number in range(unit.num_samples)]
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(WHOLE) - 1))
def test_a_file_that_was_cut_anywhere_is_refused(length: int) -> None:
    with pytest.raises(FormatError, match=r"mem://b/0\.parquet"):
        rows_of(WHOLE[:length])


@settings(max_examples=60, deadline=None)
@given(st.integers(4, FOOTER - 1), st.integers(1, 255))
def test_a_changed_byte_of_the_pages_is_noticed_where_pages_have_checksums(place: int, change: int) -> None:
    changed = bytearray(WHOLE)
    changed[place] ^= change
    try:
        found = rows_of(bytes(changed))
    except FormatError as error:
        message = error.message
        assert message.startswith("mem://b/0.parquet")
    else:
        assert found == [row(number) for number in range(ROWS)], "only what no reader looks at may differ"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes are no Parquet file"),
        (b"PAR1" + bytes(100) + b"PAR2", "it ends with b'PAR2'"),
        (b"PAR1" + bytes(100) + b"\xff\xff\xff\x7fPAR1", "a footer of 2,147,483,647 bytes in a file of 112"),
        (b"PAR1" + bytes(100) + b"\x10\0\0\0PARE", "its footer is encrypted"),
        (b"PAR1" + bytes(100) + b"\x60\0\0\0PAR1", "its footer cannot be read"),
    ],
)
def test_what_is_no_parquet_file_is_told_so(data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        rows_of(data)
