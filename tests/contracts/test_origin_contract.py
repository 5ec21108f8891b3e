"""What every origin promises (cache/origin/ports.py), over the fake, the real ones and the libraries beneath them."""

from __future__ import annotations

import asyncio
import json
import pickle
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

from cache.errors import ObjectChanged, ObjectNotFound, OriginError, from_wire
from cache.origin.ports import ObjectInfo, Origin
from cache.origin.registry import close_origins, origin_for
from tests.fakes.origin import MemoryOrigin
from tests.range_server import RangeServer


class World:
    """One kind of origin, reachable: `run` opens it in a fresh event loop and closes it again."""

    can_list = True

    def key(self, text: str) -> str:
        return text

    @asynccontextmanager
    async def open(self) -> AsyncIterator[tuple[Origin, str]]:
        raise NotImplementedError
        yield

    def run(self, check: Callable[[Origin, str], Awaitable[None]]) -> None:
        async def main() -> None:
            async with self.open() as (origin, root):
                await check(origin, root)

        asyncio.run(main())


class MemoryWorld(World):
    @asynccontextmanager
    async def open(self) -> AsyncIterator[tuple[Origin, str]]:
        yield MemoryOrigin(), "s3://bucket/dir"


class RegistryWorld(World):
    """Whatever the registry makes of a url."""

    def __init__(self, root: str) -> None:
        self.root = root

    @asynccontextmanager
    async def open(self) -> AsyncIterator[tuple[Origin, str]]:
        try:
            yield origin_for(self.root), self.root
        finally:
            await close_origins()


class HttpWorld(World):
    can_list = False

    def __init__(self, **features: bool) -> None:
        self.features = features

    def key(self, text: str) -> str:
        return quote(text)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[tuple[Origin, str]]:
        async with RangeServer() as server:
            for name, value in self.features.items():
                setattr(server, name, value)
            try:
                yield origin_for(server.url), f"{server.url}/dir"
            finally:
                await close_origins()


class CloudWorld(World):
    """Google's or Azure's store, as far as a server speaks it."""

    def __init__(self, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scheme, self.monkeypatch = scheme, monkeypatch

    @asynccontextmanager
    async def open(self) -> AsyncIterator[tuple[Origin, str]]:
        async with RangeServer() as server:
            server.lists = "google" if self.scheme == "gs" else "azure"
            account = {"gcs_base_url": server.url, "disable_oauth": True, "client_email": "", "private_key": ""}
            for name, value in {
                "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(account | {"private_key_id": ""}),
                "AZURE_STORAGE_ACCOUNT_NAME": "lab",
                "AZURE_STORAGE_ACCOUNT_KEY": "bm9ib2R5",
                "AZURE_ENDPOINT": f"{server.url}/lab",
            }.items():
                self.monkeypatch.setenv(name, value)
            try:
                yield origin_for(f"{self.scheme}://bucket"), f"{self.scheme}://bucket/dir"
            finally:
                await close_origins()


KINDS = [
    "memory",
    "file",
    "http",
    "http-without-etag",
    "http-ignoring-if-match",
    "gs",
    "az",
    "fsspec-memory",
    "fsspec-file",
    pytest.param("s3", marks=pytest.mark.s3),
    pytest.param("s3fs", marks=pytest.mark.s3),
]


@pytest.fixture(params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    kind = request.param
    if kind.startswith("s3"):
        request.getfixturevalue("s3_environment")
        place = f"{request.getfixturevalue('shared_bucket')}/{uuid.uuid4().hex}"
        yield {
            "s3": lambda: RegistryWorld(f"s3://{place}"),
            "s3fs": lambda: RegistryWorld(f"fsspec+s3://{place}"),
        }[kind]()
        return
    yield {
        "memory": lambda: MemoryWorld(),
        "file": lambda: RegistryWorld(f"file://{tmp_path}/a dir%20+"),
        "http": lambda: HttpWorld(),
        "http-without-etag": lambda: HttpWorld(sends_etag=False),
        "http-ignoring-if-match": lambda: HttpWorld(honours_if_match=False),
        "gs": lambda: CloudWorld("gs", monkeypatch),
        "az": lambda: CloudWorld("az", monkeypatch),
        "fsspec-memory": lambda: RegistryWorld(f"memory://{tmp_path.name}/dir"),
        "fsspec-file": lambda: RegistryWorld(f"fsspec+file://{tmp_path}/dir"),
    }[kind]()


def contract(check: Callable[[Origin, str], Awaitable[None]]) -> Callable[[World], None]:
    """Makes a test over all worlds of a coroutine over an origin and the url of a directory in it."""

    def test(world: World) -> None:
        world.run(check)

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    return test


async def listed(origin: Origin, url: str) -> list[ObjectInfo]:
    return [info async for info in origin.list(url)]


@contract
async def test_head_tells_the_size_and_an_etag_that_stays(origin: Origin, root: str) -> None:
    """The etag pins what a job reads for days: the same object must give the same one each time."""
    put = await origin.put(f"{root}/a", b"0123456789")
    first, second = await origin.head(f"{root}/a"), await origin.head(f"{root}/a")
    assert first == second == put
    assert first.size_bytes == 10 and first.etag and first.url == f"{root}/a"


@contract
async def test_a_missing_object_is_not_found(origin: Origin, root: str) -> None:
    """Not to be retried, and never to be taken for an outage."""
    for request in (origin.head(f"{root}/none"), origin.get_range(f"{root}/none", '"e"', 0, 1)):
        with pytest.raises(ObjectNotFound) as caught:
            await request
        assert f"{root}/none" in caught.value.message


@contract
async def test_a_range_is_exactly_its_bytes(origin: Origin, root: str) -> None:
    data = random.Random(1).randbytes(3 * 1024 * 1024 + 17)
    info = await origin.put(f"{root}/a", data)
    for start, end in [(0, len(data)), (0, 1), (len(data) - 1, len(data)), (5, 5), (1_000_000, 2_500_001)]:
        got = await origin.get_range(info.url, info.etag, start, end)
        assert memoryview(got).nbytes == end - start
        assert bytes(got) == data[start:end]


@contract
async def test_many_ranges_at_once_are_each_right(origin: Origin, root: str) -> None:
    """64 in flight is what the daemon does all day."""
    data = random.Random(2).randbytes(64 * 8192)
    info = await origin.put(f"{root}/a", data)
    parts = await asyncio.gather(
        *(origin.get_range(info.url, info.etag, i, i + 8192) for i in range(0, len(data), 8192))
    )
    assert b"".join(bytes(part) for part in parts) == data


@contract
async def test_an_object_with_new_bytes_is_changed_never_mixed(origin: Origin, root: str) -> None:
    """Same length on purpose: size alone must not be what tells versions apart."""
    old = await origin.put(f"{root}/a", b"old bytes!")
    new = await origin.put(f"{root}/a", b"new bytes!")
    assert new.etag != old.etag
    with pytest.raises(ObjectChanged):
        await origin.get_range(old.url, old.etag, 0, 5)
    assert bytes(await origin.get_range(new.url, new.etag, 0, 5)) == b"new b"


@contract
async def test_an_object_that_became_shorter_is_changed(origin: Origin, root: str) -> None:
    """The range now ends beyond the object: servers answer 416 or a part of it."""
    old = await origin.put(f"{root}/a", b"0123456789")
    await origin.put(f"{root}/a", b"0123")
    for start, end in [(2, 8), (6, 8)]:
        with pytest.raises(ObjectChanged):
            await origin.get_range(old.url, old.etag, start, end)


@contract
async def test_a_range_beyond_the_end_is_an_error_not_fewer_bytes(origin: Origin, root: str) -> None:
    info = await origin.put(f"{root}/a", b"0123456789")
    for start, end in [(8, 12), (10, 12), (20, 30)]:
        with pytest.raises(OriginError) as caught:
            await origin.get_range(info.url, info.etag, start, end)
        assert not caught.value.is_retryable


@contract
async def test_an_empty_object_can_be_opened_and_read(origin: Origin, root: str) -> None:
    info = await origin.put(f"{root}/empty", b"")
    assert (await origin.head(info.url)).size_bytes == 0
    assert bytes(await origin.get_range(info.url, info.etag, 0, 0)) == b""


@contract
async def test_errors_survive_the_wire_and_pickling(origin: Origin, root: str) -> None:
    """Fetch workers and readers are other processes than the one that sees the error."""
    with pytest.raises(ObjectNotFound) as caught:
        await origin.head(f"{root}/none")
    for copy in (pickle.loads(pickle.dumps(caught.value)), from_wire(caught.value.to_wire())):
        assert type(copy) is ObjectNotFound and str(copy) == str(caught.value) and copy.url == f"{root}/none"


@pytest.mark.parametrize("text", ["a b", "a%20b", "a+b", "a#1", "what?", "ü/日本", "x&y=z", "it's (1)!", "a:b@c", "~a"])
def test_names_are_taken_literally(world: World, text: str) -> None:
    """A key is any text: what is written under a name is found under that name and under no other."""

    async def check(origin: Origin, root: str) -> None:
        url = f"{root}/{world.key(text)}"
        info = await origin.put(url, text.encode())
        assert bytes(await origin.get_range(url, info.etag, 0, info.size_bytes)) == text.encode()
        assert (await origin.head(url)) == info
        if world.can_list:
            assert await listed(origin, root) == [info]

    world.run(check)


def test_a_prefix_is_a_directory_and_its_list_is_sorted(world: World) -> None:
    """`train` must not bring `train2`; and two nodes must see the same order."""

    async def check(origin: Origin, root: str) -> None:
        if not world.can_list:
            with pytest.raises(ObjectNotFound, match="no way to list"):
                await listed(origin, f"{root}/train")
            return
        names = ["train/b", "train/a/z", "train/a0", "train2/c", "trai", "train/empty"]
        put = {name: await origin.put(f"{root}/{name}", b"" if "empty" in name else name.encode()) for name in names}
        expected = [put[name] for name in sorted(names) if name.startswith("train/")]
        for prefix in ("train", "train/"):
            assert await listed(origin, f"{root}/{prefix}") == expected
        assert await listed(origin, root) == [put[name] for name in sorted(names)]

    world.run(check)


@contract
async def test_listing_an_object_gives_the_object(origin: Origin, root: str) -> None:
    """So that a dataset can be one file or a directory of files under the same option."""
    info = await origin.put(f"{root}/one.tar", b"0123")
    assert await listed(origin, info.url) == [info]


@contract
async def test_listing_nothing_is_not_found(origin: Origin, root: str) -> None:
    """An empty dataset is nearly always a typing error; training on zero samples helps nobody."""
    with pytest.raises(ObjectNotFound):
        await listed(origin, f"{root}/nothing")
