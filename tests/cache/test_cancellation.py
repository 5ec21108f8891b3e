"""What runs as long as the daemon ends when it is cancelled, whatever comes in at that moment: else SIGTERM would be waited for in vain."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from cache.daemon.hands import Hands


def test_the_watch_over_the_disk_ends_when_its_look_is_answered_as_it_is_cancelled() -> None:
    """asyncio.wait_for of Python 3.11 loses the cancellation then: seen as a daemon that never ended after SIGTERM."""

    async def scenario() -> bool:
        look: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        hands = SimpleNamespace(
            _on_disk=lambda *_: look, directory=SimpleNamespace(path=Path("/")), _tell=lambda _: None, space=None
        )
        watch = asyncio.create_task(
            Hands.watch_disk(cast("Any", hands), cast("Any", SimpleNamespace(used_bytes=0, num_files=0)))
        )
        await asyncio.sleep(0)
        look.set_result(cast("Any", SimpleNamespace(free_bytes=1, free_files=1)))
        watch.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        is_over = watch.done()
        watch.cancel()
        await asyncio.wait([watch])
        return is_over

    assert asyncio.run(scenario())
