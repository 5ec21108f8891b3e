"""Torch data sets over shards: every worker arrangement gives the same samples, and they are the bytes that were
stored."""

from __future__ import annotations

import io
import pickle
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache.client import Cache
from cache.client.datasets import ShardDataset, TokenDataset
from cache.client.formats.raw import RawFormat
from cache.client.formats.tar import TarFormat
from cache.client.formats.tokens import pack_tokens
from cache.client.loader import ElasticLoader
from cache.client.sampler import ElasticBatchSampler
from cache.errors import FormatError, ObjectChanged, ObjectNotFound

NUM_SHARDS, PER_SHARD = 3, 20


def payload(shard: int, number: int) -> bytes:
    return np.random.default_rng([shard, number]).bytes(100 + 7 * number)


def write_shard(path: Path, shard: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(PER_SHARD):
            for extension, data in (("bin", payload(shard, number)), ("cls", str(number % 10).encode())):
                info = tarfile.TarInfo(f"{shard}/{number:03}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def shards_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("shards")
    for shard in range(NUM_SHARDS):
        write_shard(root / f"{shard:02}.tar", shard)
    (root / "README.txt").write_text("not a shard")
    return f"file://{root}"


@pytest.fixture
def cache() -> Iterator[Cache]:
    cache = Cache(socket="")
    yield cache
    cache.close()


def decode(raw: dict[str, Any]) -> tuple[int, int, int]:
    return raw["__index__"], len(raw["bin"]), int(raw["cls"])


def as_list(batch: list[Any]) -> list[Any]:
    return batch


def test_samples_are_the_bytes_that_were_stored(cache: Cache, shards_url: str) -> None:
    dataset = ShardDataset(cache, shards_url, TarFormat())
    assert len(dataset) == NUM_SHARDS * PER_SHARD
    assert dataset.shard_sizes == (PER_SHARD,) * NUM_SHARDS
    wanted = [59, 0, 20, 21, 0]
    for sample, raw in zip(wanted, dataset.__getitems__(wanted), strict=True):
        shard, number = divmod(sample, PER_SHARD)
        assert raw == {
            "__key__": f"{shard}/{number:03}",
            "__url__": f"{shards_url}/{shard:02}.tar",
            "__index__": sample,
            "bin": payload(shard, number),
            "cls": str(number % 10).encode(),
        }
        assert dataset[sample] == raw


@pytest.mark.parametrize("sample", [-1, 60])
def test_number_outside_is_an_index_error(cache: Cache, shards_url: str, sample: int) -> None:
    """Python's iteration protocol ends at IndexError; wrapping around would train on the wrong sample."""
    with pytest.raises(IndexError, match="data set of 60"):
        ShardDataset(cache, shards_url, TarFormat())[sample]


OPTIONS: dict[str, dict[str, Any]] = {
    "in the process": {},
    "forked workers": {"num_workers": 2, "multiprocessing_context": "fork"},
    "forked workers that stay": {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True},
    "spawned workers": {"num_workers": 1, "multiprocessing_context": "spawn"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_batches_are_the_same_however_they_are_loaded(cache: Cache, shards_url: str, options: dict[str, Any]) -> None:
    """Two epochs: what a worker keeps open from the first must not disturb the second. The parent reads before it
    forks."""
    dataset = ShardDataset(cache, shards_url, TarFormat(), decode)
    expected = [
        [decode(dataset_raw) for dataset_raw in raw(dataset, batch)]
        for epoch in range(2)
        for batch in epoch_of(dataset, epoch)
    ]
    loader = ElasticLoader(dataset, ElasticBatchSampler(dataset, 15, seed=1), collate_fn=as_list, **options)
    assert [batch for _ in range(2) for batch in loader] == expected
    assert loader.epoch == 2


def epoch_of(dataset: ShardDataset, epoch: int) -> list[list[int]]:
    sampler = ElasticBatchSampler(dataset, 15, seed=1, announce=False)
    sampler.set_epoch(epoch)
    return list(sampler)


def raw(dataset: ShardDataset, batch: list[int]) -> list[dict[str, Any]]:
    plain = ShardDataset.__new__(ShardDataset)
    plain.__setstate__({**dataset.__getstate__(), "decode": None})
    return plain.__getitems__(batch)


def test_a_dataset_survives_pickling(cache: Cache, shards_url: str) -> None:
    dataset = ShardDataset(cache, shards_url, TarFormat(), decode)
    again = pickle.loads(pickle.dumps(dataset))
    assert again.__getitems__([3, 59]) == dataset.__getitems__([3, 59])
    again.cache.close()


def test_threads_may_share_a_dataset(cache: Cache, shards_url: str) -> None:
    dataset = ShardDataset(cache, shards_url, TarFormat(), decode)
    expected = [dataset[sample] for sample in range(60)]
    seen: list[list[Any]] = [[] for _ in range(4)]

    def read(mine: list[Any]) -> None:
        mine.extend(dataset[sample] for sample in range(60))

    threads = [threading.Thread(target=read, args=(mine,)) for mine in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [expected] * 4


def test_a_shard_that_changed_after_indexing_is_an_error_and_not_a_mixture(cache: Cache, tmp_path: Path) -> None:
    """Offsets of the old archive in the bytes of the new one would be garbage that still decodes now and then."""
    path = tmp_path / "0.tar"
    write_shard(path, 0)
    dataset = ShardDataset(cache, f"file://{tmp_path}", TarFormat())
    path.unlink()
    write_shard(path, 1)
    with pytest.raises(ObjectChanged, match="when it was opened"):
        dataset[0]


def test_a_decoder_that_fails_says_at_which_sample(cache: Cache, shards_url: str) -> None:
    def broken(raw: dict[str, Any]) -> None:
        raise RuntimeError("no such colour")

    dataset = ShardDataset(cache, shards_url, TarFormat(), broken)
    with pytest.raises(RuntimeError, match="no such colour") as failed:
        dataset[21]
    assert failed.value.__notes__ == [f"while decoding sample '1/001' (number 21) of {shards_url}/01.tar"]


def test_nothing_that_is_a_shard_is_an_error_with_what_was_looked_for(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"x")
    with pytest.raises(ObjectNotFound, match=r"none of the 1 objects below .* is a shard of TarFormat\(suffix='.tar'"):
        ShardDataset(cache, f"file://{tmp_path}", TarFormat())


def test_an_object_that_is_named_need_not_end_like_a_shard(cache: Cache, tmp_path: Path) -> None:
    write_shard(tmp_path / "archive", 0)
    assert len(ShardDataset(cache, [f"file://{tmp_path}/archive"], TarFormat())) == PER_SHARD


def test_a_broken_shard_names_itself(cache: Cache, tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", 0)
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[:3000])
    with pytest.raises(FormatError, match=r"1\.tar: cut short"):
        ShardDataset(cache, f"file://{tmp_path}", TarFormat())


def test_raw_files_decode_like_tar_shards(cache: Cache, tmp_path: Path) -> None:
    for name in ("cat/1.bin", "dog/2.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    dataset = ShardDataset(cache, f"file://{tmp_path}", RawFormat(), decode)
    assert dataset.classes == ("cat", "dog")
    assert [dataset[sample] for sample in range(2)] == [(0, 9, 0), (1, 9, 1)]


def test_token_windows_predict_every_token_once(cache: Cache, tmp_path: Path) -> None:
    for shard, num_tokens in enumerate((33, 40)):
        (tmp_path / f"{shard}.tokens").write_bytes(pack_tokens(np.arange(num_tokens) + 100 * shard))
    dataset = TokenDataset(cache, f"file://{tmp_path}", seq_len=8)
    assert dataset.shard_sizes == (4, 4)
    inputs, targets = dataset[5]
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.tolist() == list(range(108, 116))
    assert targets.tolist() == list(range(109, 117))


@pytest.fixture
def few_descriptors(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def limit(max_descriptors: int) -> None:
        monkeypatch.setattr("cache.client.handles._raise_descriptor_limit", lambda: 2 * max_descriptors)

    return limit


def test_open_shards_are_bounded_by_descriptors(
    cache: Cache, shards_url: str, few_descriptors: Callable[[int], None]
) -> None:
    """A data set of 100,000 files must not run into 'too many open files'."""
    few_descriptors(1)
    dataset = ShardDataset(cache, shards_url, TarFormat(), decode)
    assert [dataset[sample][0] for sample in (0, 25, 50, 0)] == [0, 25, 50, 0]
    assert len(dataset._shards._open) == 1
