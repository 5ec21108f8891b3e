"""Which threads enter the interpreter while an origin is read and written.

A thread that Python did not make is not joined when the interpreter ends. One that is inside it at that moment (it only has to have let
go of the lock for a `send`) is ended by Python there, through the native frames above it, and that aborts the process with all its work
done.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextvars import Context
from typing import Any

from cache.origin.registry import close_origins, origin_for
from tests.range_server import RangeServer


class WatchedLoop(asyncio.SelectorEventLoop):
    """Notes who hands results over to it."""

    def __init__(self) -> None:
        self.strangers: list[int] = []
        self.num_calls = 0
        super().__init__()

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        self.num_calls += 1
        if threading.get_ident() not in {thread.ident for thread in threading.enumerate()}:
            self.strangers.append(threading.get_native_id())
        return super().call_soon_threadsafe(callback, *args, context=context)


def test_only_threads_that_are_joined_at_the_end_hand_results_over() -> None:
    """obstore's own `async` calls do it in tokio's threads: of 60 processes that asked for an object and ended, 6 were aborted."""
    loop = WatchedLoop()

    async def use() -> None:
        async with RangeServer() as server:
            url = f"{server.url}/dir/a"
            try:
                origin = origin_for(url)
                info = await origin.put(url, b"content" * 10_000)
                assert bytes(await origin.get_range(url, info.etag, 7, 14)) == b"content"
                assert [found.url async for found in origin.list(url)] == [url]
            finally:
                await close_origins()

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(use())
    assert loop.num_calls >= 4
    assert loop.strangers == []


def test_a_body_on_its_way_holds_nothing_of_pythons() -> None:
    """A buffer of Python's would be let go of by the thread that sends it."""
    body = bytearray(b"x" * 100_000)

    async def use() -> None:
        async with RangeServer() as server:
            try:
                putting = asyncio.ensure_future(origin_for(server.url).put(f"{server.url}/a", body))
                while "a" not in server.objects:
                    await asyncio.wait([putting], timeout=0.01)
                    body.append(1)  # BufferError while somebody holds it
                await putting
                assert server.objects["a"][0] == b"x" * 100_000, "what was put is what it was when it was put"
            finally:
                await close_origins()

    asyncio.run(use())
