"""Preparation scripts: the same arguments give the same bytes, and data that is already there is left alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cache.client import Cache
from cache.client.formats.tar import TarFormat
from cache.client.indexing import build_index
from train_examples.prepare_digits import shifted, tar_of
from train_examples.prepare_text import source_files, text_of
from train_examples.publish import publish


def test_published_data_is_not_written_again(tmp_path: Path) -> None:
    """New etags would make every warm cache cold."""
    manifest = {"name": "x", "version": 1}
    assert publish(f"file://{tmp_path}/data", manifest, [("train/0.tar", b"one")])
    before = (tmp_path / "data/train/0.tar").stat()
    assert not publish(f"file://{tmp_path}/data", manifest, [("train/0.tar", b"two")])
    after = (tmp_path / "data/train/0.tar").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert publish(f"file://{tmp_path}/data", {**manifest, "version": 2}, [("train/0.tar", b"two")])
    assert (tmp_path / "data/train/0.tar").read_bytes() == b"two"


def test_manifest_comes_last(tmp_path: Path) -> None:
    """A manifest means that everything is there: preparation that breaks off in the middle must not leave one."""

    def shards() -> Iterator[tuple[str, bytes]]:
        yield "0.tar", b"one"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(f"file://{tmp_path}", {}, shards())
    assert [path.name for path in tmp_path.iterdir()] == ["0.tar"]
    assert publish(f"file://{tmp_path}", {}, [("0.tar", b"one")])
    assert json.loads((tmp_path / "manifest.json").read_text()) == {}


def test_the_index_of_tar_shards_is_published_with_them(tmp_path: Path) -> None:
    """The first batch of a cold node waits for its own samples then, not for all headers."""
    shard = tar_of([("a", np.arange(64, dtype=np.uint8).reshape(8, 8), 3)])
    assert publish(f"file://{tmp_path}", {}, [("train/0.tar", shard)], indexed=("train",))
    cache = Cache("")
    report = build_index(cache, f"file://{tmp_path}/train", TarFormat())
    assert (len(report.index), report.num_built) == (1, 0)
    cache.close()


def test_equal_samples_give_equal_archives() -> None:
    samples = [("a", np.arange(64, dtype=np.uint8).reshape(8, 8), 3)]
    assert tar_of(samples) == tar_of(samples)


@pytest.mark.parametrize("seed", range(5))
def test_a_shifted_digit_keeps_its_size_and_its_inner_pixels(seed: int) -> None:
    image = np.zeros((8, 8), dtype=np.uint8)
    image[3:5, 3:5] = 9
    moved = shifted(image, np.random.default_rng(seed))
    assert moved.shape == (8, 8)
    assert moved.sum() == image.sum()


def test_text_is_sorted_source_with_an_end_after_each_file(tmp_path: Path) -> None:
    (tmp_path / "pkg/test").mkdir(parents=True)
    for name in ("b.py", "a.py", "pkg/c.py", "pkg/test/skipped.py", "notes.txt"):
        (tmp_path / name).write_text(name)
    files = source_files(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in files] == ["a.py", "b.py", "pkg/c.py"]
    assert text_of(iter(files)).tobytes() == b"a.py\0b.py\0pkg/c.py\0"
