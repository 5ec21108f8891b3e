"""The control process's fetch workers: none that stops answering holds anybody up."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from cache.daemon import pool as pool_module
from cache.daemon.pool import WorkerPool
from cache.errors import OriginUnavailable


def test_a_worker_that_is_frozen_is_replaced_and_its_requests_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process keeps its socket open: without asking it, its requests would wait for ever."""
    monkeypatch.setattr(pool_module, "PING_EVERY_S", 0.05)
    (tmp_path / "object").write_bytes(b"bytes")
    head = {"op": "head", "url": f"file://{tmp_path}/object"}

    async def scenario() -> tuple[int, int]:
        pool = WorkerPool(1)
        pool.start()
        try:
            frozen = pool.pids[0]
            assert (await pool.request(head)).header["info"]["size_bytes"] == 5
            monkeypatch.setattr(pool_module, "PING_TIMEOUT_S", 0.5)
            await asyncio.sleep(0.2)  # the ping that was under way with the old time-out is over
            os.kill(frozen, signal.SIGSTOP)
            with pytest.raises(OriginUnavailable):
                await pool.request(head)
            monkeypatch.undo()  # the next worker may take its time to start
            async with asyncio.timeout(30):
                while pool.pids[0] == frozen:  # noqa: ASYNC110  nothing announces it
                    await asyncio.sleep(0.01)
            assert (await pool.request(head)).header["info"]["size_bytes"] == 5
            return pool.num_restarts, frozen
        finally:
            await pool.close()

    num_restarts, frozen = asyncio.run(scenario())
    assert num_restarts == 1
    assert not Path(f"/proc/{frozen}").exists()
