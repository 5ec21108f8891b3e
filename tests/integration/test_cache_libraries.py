"""`nodecache::` as people use it: with the real pyarrow, pandas, Hugging Face datasets and webdataset, with threads, workers and forks.

A library that cannot be installed here is skipped, and says so.
"""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.counting_origin import CountingOrigin, random_bytes
from tests.daemon import CacheDaemon

pa: Any = pytest.importorskip("pyarrow")
pq: Any = pytest.importorskip("pyarrow.parquet")

NUM_ROWS = 3000


@pytest.fixture
def daemon(cache_daemon: CacheDaemon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[CacheDaemon]:
    """The environment of a rank: the libraries find the daemon by themselves."""
    monkeypatch.setenv("RAILHEAD_CACHE_SOCKET", cache_daemon.socket)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fsspec.get_filesystem_class("nodecache").clear_instance_cache()
    yield cache_daemon
    fsspec.get_filesystem_class("nodecache").clear_instance_cache()


@pytest.fixture
def table_file(tmp_path: Path) -> Path:
    """Three row groups, larger than a block in all."""
    path = tmp_path / "data" / "part-0.parquet"
    path.parent.mkdir()
    payload = [random_bytes(300, row) for row in range(NUM_ROWS)]
    table = pa.table({"row": list(range(NUM_ROWS)), "payload": payload})
    pq.write_table(table, path, row_group_size=NUM_ROWS // 3)
    return path


def from_cache(daemon: CacheDaemon) -> bool:
    """Whether what was read went through the daemon: it holds it."""
    return bool(daemon.status()["used_bytes"])


def test_pyarrow_reads_columns_and_whole_data_sets(daemon: CacheDaemon, table_file: Path) -> None:
    fs, path = fsspec.core.url_to_fs(f"nodecache::file://{table_file}")
    rows = pq.read_table(path, filesystem=fs, columns=["row"])["row"].to_pylist()
    assert rows == list(range(NUM_ROWS))
    import pyarrow.dataset as ds

    folder = fs._strip_protocol(f"nodecache::file://{table_file.parent}")
    dataset = ds.dataset(folder, filesystem=fs, format="parquet")
    wanted = dataset.to_table(filter=ds.field("row") == 1234).to_pydict()
    assert wanted == {"row": [1234], "payload": [random_bytes(300, 1234)]}
    assert from_cache(daemon)


def test_pyarrow_reads_from_many_threads_at_once(daemon: CacheDaemon, table_file: Path) -> None:
    fs, path = fsspec.core.url_to_fs(f"nodecache::file://{table_file}")
    expected = pq.read_table(table_file)
    wrong: list[bool] = []

    def read() -> None:
        wrong.extend(not pq.read_table(path, filesystem=fs, use_threads=True).equals(expected) for _ in range(3))

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [False] * 18 and from_cache(daemon)


def test_pandas_reads_parquet_and_csv(daemon: CacheDaemon, table_file: Path) -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.read_parquet(f"nodecache::file://{table_file}")
    assert frame["row"].tolist() == list(range(NUM_ROWS)) and frame["payload"][7] == random_bytes(300, 7)
    csv = table_file.with_name("t.csv")
    csv.write_text("a,b\n" + "".join(f"{n},{n * n}\n" for n in range(20_000)))
    squares = pd.read_csv(f"nodecache::file://{csv}")
    assert squares["b"].tolist() == [n * n for n in range(20_000)] and from_cache(daemon)
    chunks = pd.read_csv(f"nodecache::file://{csv}", chunksize=7000)
    assert sum(len(chunk) for chunk in chunks) == 20_000


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_datasets_stream_through_the_cache(
    daemon: CacheDaemon, table_file: Path, counting_origin: CountingOrigin
) -> None:
    """It takes what stands before "::" for a local path, and a scheme within a path for the whole url: so the store is an option."""
    datasets = pytest.importorskip("datasets")
    url = "nodecache://" + counting_origin.put("t.parquet", table_file.read_bytes()).removeprefix("http://")
    options = {"target_protocol": "http"}
    stream = datasets.load_dataset("parquet", data_files=url, split="train", streaming=True, storage_options=options)
    rows = [row["row"] for row in stream]
    assert rows == list(range(NUM_ROWS)) and from_cache(daemon)
    shuffled = [row["row"] for row in stream.shuffle(seed=1, buffer_size=100)]
    assert shuffled != rows and sorted(shuffled) == rows


def write_tar(path: Path, first: int, count: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + count):
            for name, data in (
                (f"{number:05d}.cls", str(number).encode()),
                (f"{number:05d}.bin", random_bytes(2000, number)),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.mark.filterwarnings("ignore")
def test_webdataset_reads_shards_in_workers(daemon: CacheDaemon, tmp_path: Path) -> None:
    """Its own reader takes any opener for a scheme; its workers are forked from the process that has the cache open."""
    wds = pytest.importorskip("webdataset")
    import torch

    urls = []
    for shard in range(4):
        write_tar(tmp_path / f"{shard}.tar", shard * 50, 50)
        urls.append(f"nodecache::file://{tmp_path}/{shard}.tar")
    fsspec.open(urls[0]).open().read(10)  # this process has connections of its own before it forks

    def opened(sources: Any) -> Iterator[dict[str, Any]]:
        for source in sources:
            with fsspec.open(source["url"], "rb") as stream:
                yield {"url": source["url"], "stream": stream}

    pipeline = wds.DataPipeline(
        wds.SimpleShardList(urls),
        wds.split_by_worker,
        opened,
        wds.tariterators.tar_file_expander,
        wds.tariterators.group_by_keys,
    )
    loader = torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=2)
    got = {int(sample["cls"]): sample["bin"] for sample in loader}
    assert got == {number: random_bytes(2000, number) for number in range(200)} and from_cache(daemon)


def test_a_process_forked_in_the_middle_of_a_librarys_reads_shares_no_connection(
    daemon: CacheDaemon, counting_origin: CountingOrigin
) -> None:
    """What breaks a streaming library of today: children read on the parent's open connection and get its answers, unnoticed."""
    contents = [random_bytes(400_000, idx) for idx in range(4)]
    urls = [counting_origin.put(f"o{idx}", content) for idx, content in enumerate(contents)]
    files = [fsspec.open(f"nodecache::{url}").open() for url in urls]
    stop, wrong = threading.Event(), []

    def read_on() -> None:
        while not stop.is_set():
            for file, content in zip(files, contents, strict=True):
                file.seek(1000)
                if file.read(50_000) != content[1000:51_000]:
                    wrong.append("parent")

    reading = threading.Thread(target=read_on)
    reading.start()
    codes = []
    for _ in range(12):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                fs = fsspec.filesystem("nodecache", target_protocol="http")
                code = 0 if all(fs.cat_file(u) == c for u, c in zip(urls, contents, strict=True)) else 2
            finally:
                os._exit(code)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    stop.set()
    reading.join()
    assert codes == [0] * 12 and not wrong
    for file in files:
        file.close()


def test_open_files_and_file_systems_travel_to_other_processes(
    daemon: CacheDaemon, counting_origin: CountingOrigin
) -> None:
    """Spawned data loader workers and Ray get them pickled."""
    data = random_bytes(10_000)
    url = counting_origin.put("o", data)
    opener = pickle.loads(pickle.dumps(fsspec.open(f"nodecache::{url}")))
    with opener as file:
        assert file.read() == data
    fs = pickle.loads(pickle.dumps(fsspec.filesystem("nodecache", target_protocol="http")))
    assert fs.cat_file(url) == data and from_cache(daemon)
