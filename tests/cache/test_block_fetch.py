"""A run of blocks on its way into its file: cut, silent, late and refused answers, over real sockets."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crc32c
import pytest

from cache.blocks import BLOCK_BYTES, ExtentId, ObjectId
from cache.daemon import blockfetch
from cache.daemon.fetches import Fetches
from cache.errors import OriginThrottled, OriginUnavailable, from_wire
from cache.store.directory import CacheDirectory
from cache.store.files import create_extent, read_label, write_payload
from cache.store.format import LABEL_BYTES, ExtentLabel
from tests.counting_origin import CountingOrigin, Fault, random_bytes
from tests.daemon import wait_until

DATA = random_bytes(6 * BLOCK_BYTES + 1000)
ALL = set(range(7))


class File:
    """An object at the origin and an empty extent file for it."""

    def __init__(self, root: Path, origin: CountingOrigin, data: bytes = DATA) -> None:
        self.data = data
        url = origin.put("o", data)
        directory = CacheDirectory.open(root)
        assert isinstance(directory, CacheDirectory)
        self.directory = directory
        object_id = ObjectId(url, origin.etags["o"], len(data))
        create_extent(directory, ExtentLabel(object_id, 0), 1)
        self.path = directory.extent_path(ExtentId(object_id.content_id, 0), 1)
        self.request: dict[str, Any] = {
            "url": url,
            "etag": object_id.etag,
            "start": 0,
            "end": len(data),
            "path": str(self.path),
            "slot": 0,
            "stall_s": 10.0,
            "fetch_id": 1,
        }

    def payload(self) -> bytes:
        return self.path.read_bytes()[:-LABEL_BYTES]


@pytest.fixture
def file(counting_origin: CountingOrigin) -> Iterator[File]:
    with tempfile.TemporaryDirectory(prefix="rh-") as root:
        made = File(Path(root), counting_origin)
        yield made
        made.directory.close()


def _fetch(request: dict[str, Any]) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        fetches = Fetches()
        try:
            return await fetches.fetch(request)
        finally:
            await fetches.close()

    return asyncio.run(run())


def test_a_run_is_in_its_file_with_the_checksum_of_each_block(file: File, counting_origin: CountingOrigin) -> None:
    answer = _fetch(file.request)
    assert answer["first_byte_s"] <= answer["seconds"]
    assert file.payload() == file.data
    _, present = read_label(file.path)
    assert present == ALL
    assert counting_origin.asked == [("o", 0, len(file.data))]


def test_what_a_socket_gives_in_pieces_is_written_by_whole_blocks(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces as they come would lie in small pages of the page cache, and every later hit would pay for it (benchmarks/pages.py)."""
    written: list[tuple[int, int]] = []

    def recorded(fd: int, offset: int, data: memoryview) -> None:
        written.append((offset, len(data)))
        write_payload(fd, offset, data)

    monkeypatch.setattr(blockfetch, "write_payload", recorded)
    _fetch(file.request)
    assert file.payload() == file.data
    whole, rest = divmod(len(file.data), BLOCK_BYTES)
    blocks = [(idx * BLOCK_BYTES, BLOCK_BYTES) for idx in range(whole)]
    assert written == [*blocks, *([(whole * BLOCK_BYTES, rest)] if rest else [])]


def test_a_cut_body_goes_on_from_the_last_byte(file: File, counting_origin: CountingOrigin) -> None:
    """A cut near the end must not cost the whole again; and a block's first bytes are checked with its rest."""
    counting_origin.fault = lambda path, start, end: Fault(after_bytes=BLOCK_BYTES + 177_777) if start == 0 else None
    first = _fetch(file.request)
    assert isinstance(from_wire(first["failed"]), OriginUnavailable)
    done = first["done"]
    assert BLOCK_BYTES <= done <= BLOCK_BYTES + 177_777
    assert read_label(file.path)[1] == {0}
    assert first["crc"] == crc32c.crc32c(file.data[BLOCK_BYTES:done])
    _fetch({**file.request, "done": done, "crc": first["crc"]})
    assert file.payload() == file.data
    assert read_label(file.path)[1] == ALL
    assert counting_origin.asked[1] == ("o", done, len(file.data))


def test_silence_is_noticed_and_what_came_is_kept(file: File, counting_origin: CountingOrigin) -> None:
    """A connection that is silent in mid-body is not an error to TCP: without a clock of ours it would hold a reader for minutes."""
    counting_origin.fault = lambda path, start, end: Fault(after_bytes=BLOCK_BYTES, stalls=True)
    answer = _fetch({**file.request, "stall_s": 0.3})
    assert "no byte for 0.3 s" in answer["failed"]["message"]
    assert answer["done"] == BLOCK_BYTES


def test_a_refusal_tells_for_how_long(file: File, counting_origin: CountingOrigin) -> None:
    counting_origin.fault = lambda path, start, end: Fault(refuse=503, headers=(("Retry-After", "9"),))
    error = from_wire(_fetch(file.request)["failed"])
    assert isinstance(error, OriginThrottled)
    assert error.retry_after_s == 9.0


def test_a_late_run_gets_a_second_reader_which_asks_for_the_rest_only(
    file: File, counting_origin: CountingOrigin
) -> None:
    """The first one is silent after a block; the hedge begins there, and its bytes end the run."""
    counting_origin.fault = lambda path, start, end: Fault(BLOCK_BYTES, stalls=True) if start == 0 else None

    async def run() -> dict[str, Any]:
        fetches = Fetches()
        fetching = asyncio.create_task(fetches.fetch(file.request))
        await asyncio.to_thread(wait_until, lambda: read_label(file.path)[1] == {0}, "the first block is there")
        assert fetches.hedge(1)
        answer = await fetching
        assert not fetches.hedge(1), "what is over needs no help"
        await fetches.close()
        return answer

    answer = asyncio.run(run())
    assert "failed" not in answer
    assert file.payload() == file.data
    assert counting_origin.asked[1][1] == BLOCK_BYTES


def test_two_readers_of_one_run_write_each_byte_once(file: File, counting_origin: CountingOrigin) -> None:
    """Whoever is behind has nothing to say; whoever is ahead does not leave a hole."""
    from cache.daemon.blockfetch import BlockFetch

    label, _ = read_label(file.path)
    run = BlockFetch(os.open(file.path, os.O_RDWR), label, 0, len(file.data))
    data = memoryview(file.data)

    def reader(step: int) -> None:
        at = 0
        while run.put(at, data[at : at + step]) and at + step < len(data):
            at += step

    threads = [threading.Thread(target=reader, args=(step,)) for step in (100_001, 65_536, 262_144)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run.close()
    assert run.done == len(file.data)
    assert file.payload() == file.data
    assert read_label(file.path)[1] == ALL
    assert not run.put(0, data[:10]), "a closed run takes nothing"


def test_a_redirect_is_followed_by_the_stores_client(file: File, counting_origin: CountingOrigin) -> None:
    """The plain reader knows 206 and gives everything else to who may know it; the bytes come all the same."""
    counting_origin.put("there", file.data)
    counting_origin.etags["there"] = counting_origin.etags["o"]
    counting_origin.fault = lambda path, start, end: (
        Fault(refuse=307, headers=(("Location", counting_origin.url("there")),)) if path == "o" else None
    )
    assert "failed" not in _fetch(file.request)
    assert file.payload() == file.data
