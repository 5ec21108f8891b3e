"""The control process's part of fetching: one request of the machine becomes as many to workers as it takes.

A body that was cut or fell silent goes on from the last byte that came, at once and in another worker, as long as each try brings
something; what brings nothing is the machine's to try again later. A run that is late gets a second reader (residency/hedging.py says
when). All runs on the event loop; payload stays in the workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from cache.blocks import BLOCK_BYTES
from cache.daemon.pool import WorkerPool, WorkerProcess
from cache.errors import CacheError, CapacityError, OriginThrottled, PeerError, from_wire
from cache.residency.origins import OriginState

MAX_GOING_ON = 8
"""Tries in a row of which each brought some bytes, before the machine is asked again."""

MAX_REMEMBERED = 4096

SLOW_PEER_S = 5.0
SLOWER_THAN_ORIGIN = 2.0
SLOWER_THAN_ITSELF = 3.0
"""A peer that works but takes longer than all of these (seconds; times what the origin itself takes for so much; times what it takes
itself, at the 95th percentile) is passed by, within the budget of hedges. A peer that only waits for a slow or crowded origin is not: to
ask that once more would help nobody."""

PartKey = tuple[str, int]
"""A file and the first byte of a block of it that came in part."""


@dataclass(frozen=True)
class FetchResult:
    """`error`: None when all came; then `seconds` is what it took, 0 if that says nothing about the origin. Else the first
    `num_whole_blocks` of the run are there."""

    seconds: float = 0.0
    write_s: float = 0.0
    error: CacheError | None = None
    num_whole_blocks: int = 0
    silence_s: float = 0.0
    """Of a peer: how long it gave no sign of life, at most."""


@dataclass
class FetchTotals:
    """Since the daemon started."""

    hedges: int = 0
    resumed_fetches: int = 0
    resumed_bytes: int = 0
    throttled: int = 0


class Fetcher:
    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._ids = itertools.count(1)
        self._came: OrderedDict[PartKey, tuple[int, int]] = OrderedDict()
        """Of blocks that came in part when a fetch was given up: how many bytes are in the file, and their checksum."""
        self.totals = FetchTotals()

    async def fetch(self, request: dict[str, Any], origin: OriginState) -> FetchResult:
        """Has a run of blocks brought into its file."""
        length = request["end"] - request["start"]
        began_s = time.monotonic()
        done, crc = self._came.pop((request["path"], request["start"]), (0, 0))
        avoid: WorkerProcess | None = None
        error = CacheError("never tried")
        for nth in range(MAX_GOING_ON):
            if done:
                self.totals.resumed_fetches += 1
                self.totals.resumed_bytes += done
            asked = {
                **request,
                "op": "fetch",
                "fetch_id": next(self._ids),
                "stall_s": origin.hedging.stall_s,
                "done": done,
                "crc": crc,
            }
            avoid = self._pool.pick(avoid)
            try:
                answer = await self._ask(avoid, asked, length - done, origin)
            except CacheError as failed:
                # The disk refused, or the worker died: nothing is known of what came in this try.
                error = failed
                break
            if "failed" not in answer:
                seconds = time.monotonic() - began_s
                if nth == 0 and not done:
                    origin.landed(length, seconds, answer["first_byte_s"], time.monotonic())
                    return FetchResult(seconds, answer["write_s"])
                return FetchResult(0.0, answer["write_s"])
            error = from_wire(answer["failed"])
            came, done, crc = answer["done"] - done, answer["done"], answer["crc"]
            self.totals.throttled += isinstance(error, OriginThrottled)
            if not came or not error.is_retryable:
                break
        if isinstance(error, CapacityError):
            done = 0  # The disk refused: what it said of earlier bytes is not relied on.
        self._remember(request, done, crc)
        return FetchResult(error=error, num_whole_blocks=done // BLOCK_BYTES)

    async def borrow(
        self, request: dict[str, Any], peer: dict[str, Any], state: OriginState, origin: OriginState, silence_s: float
    ) -> FetchResult:
        """Has a run brought from another node; an error that says how that went wrong is a PeerError. `origin`: the object's, for
        comparison. `silence_s`: after so long without a sign of life it is given up."""
        num_bytes = request["end"] - request["start"]
        asked = {**request, "op": "fetch", "fetch_id": next(self._ids), "stall_s": silence_s, "peer": peer}
        worker, began_s = self._pool.pick(), time.monotonic()
        answering = asyncio.create_task(worker.request(asked))
        is_slow = False
        try:
            await asyncio.wait([answering], timeout=_patience_s(origin, state, num_bytes))
            if not answering.done() and state.hedging.take(time.monotonic()):
                is_slow = True
                with contextlib.suppress(CacheError):
                    await worker.request({"op": "cancel", "fetch_id": asked["fetch_id"]})
            answer = (await answering).header
        except CacheError as error:
            return FetchResult(error=error)
        finally:
            answering.cancel()
        if "failed" not in answer:
            seconds = time.monotonic() - began_s
            state.landed(num_bytes, seconds, answer["first_byte_s"], time.monotonic())
            return FetchResult(seconds, answer["write_s"], silence_s=answer["silence_s"])
        failed = from_wire(answer["failed"])
        if is_slow and not isinstance(failed, CapacityError):
            failed = PeerError(f"peer {peer['node']} took {time.monotonic() - began_s:.1f} s", reason="slow")
        return FetchResult(error=failed)

    async def _ask(
        self, worker: WorkerProcess, request: dict[str, Any], num_bytes: int, origin: OriginState
    ) -> dict[str, Any]:
        answering = asyncio.create_task(worker.request(request))
        try:
            late_s = origin.hedging.hedge_after_s(num_bytes)
            if late_s is not None:
                await asyncio.wait([answering], timeout=late_s)
                if not answering.done() and origin.hedging.take(time.monotonic()):
                    self.totals.hedges += 1
                    with contextlib.suppress(CacheError):
                        await worker.request({"op": "hedge", "fetch_id": request["fetch_id"]})
            return (await answering).header
        finally:
            answering.cancel()

    def _remember(self, request: dict[str, Any], done: int, crc: int) -> None:
        whole = done // BLOCK_BYTES * BLOCK_BYTES
        if done > whole:
            self._came[request["path"], request["start"] + whole] = (done - whole, crc)
            if len(self._came) > MAX_REMEMBERED:
                self._came.popitem(last=False)


def _patience_s(origin: OriginState, peer: OriginState, num_bytes: int) -> float:
    """How long a peer may take for this much."""
    usual_s = origin.hedging.hedge_after_s(num_bytes)
    if usual_s is None:
        return SLOW_PEER_S
    own_s = peer.hedging.hedge_after_s(num_bytes) or 0.0
    return max(SLOW_PEER_S, SLOWER_THAN_ORIGIN * usual_s, SLOWER_THAN_ITSELF * own_s)
