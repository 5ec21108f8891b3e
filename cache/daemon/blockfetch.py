"""Neighbouring blocks on their way into their extent file, filled by one reader or, when that one is late, by two; in threads.

Readers append: bytes count only beyond what has come, under a lock, so two readers of the same range write nothing twice and the checksums
run along. Each begins where the run has got to, so a second reader, or one after a cut, asks only for the rest. Any thread.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import crc32c

from cache.blocks import BLOCK_BYTES
from cache.errors import CorruptBlock
from cache.origin import failures
from cache.origin.plain_http import (
    MAX_ERROR_BODY_BYTES,
    Connections,
    Head,
    PlainTarget,
    RangeConnection,
    check_partial,
    refusal,
    request_bytes,
    transport_error,
)
from cache.store.files import write_entry, write_payload
from cache.store.format import ExtentLabel

BUFFER_BYTES = 256 * 1024

_own = threading.local()


class BlockFetch:
    """`length` bytes from slot `slot` on, of which `done` have come already; `crc`: of those of them that belong to an unfinished block.

    Owns `fd`, an open extent file with this label."""

    def __init__(self, fd: int, label: ExtentLabel, slot: int, length: int, done: int = 0, crc: int = 0) -> None:
        self.length = length
        self.done = done
        self.crc = crc
        self.write_s = 0.0
        """How long the local disk took to take it."""
        self.is_closed = False
        self.expected: list[int] | None = None
        """Checksums that the blocks must have (a peer's); None: what comes is what is believed (the origin's)."""
        self.silence_s = 0.0
        """How long a peer gave no sign of life, at most, before its answer."""
        self._fd = fd
        self._label = label
        self._slot = slot
        self._lock = threading.Lock()
        self._connections: set[RangeConnection] = set()

    def put(self, at: int, data: memoryview) -> bool:
        """The bytes from `at` (within the run) on. False: no more are needed. Raises CapacityError when the disk refuses them,
        CorruptBlock when a block is not what was expected (then it is not there)."""
        with self._lock:
            if self.is_closed:
                return False
            began_s = time.monotonic()
            new = data[self.done - at :] if self.done > at else data
            while new:
                piece = new[: BLOCK_BYTES - self.done % BLOCK_BYTES]
                write_payload(self._fd, self._slot * BLOCK_BYTES + self.done, piece)
                self.crc = crc32c.crc32c(piece, self.crc)
                self.done += len(piece)
                new = new[len(piece) :]
                if self.done % BLOCK_BYTES == 0 or self.done == self.length:
                    self._block_is_whole()
            self.write_s += time.monotonic() - began_s
            return self.done < self.length

    def _block_is_whole(self) -> None:
        idx = (self.done - 1) // BLOCK_BYTES
        if self.expected is not None and self.expected[idx] != self.crc:
            self.done, self.crc = idx * BLOCK_BYTES, 0
            raise CorruptBlock(f"block {idx} of the run is not what its checksum says")
        write_entry(self._fd, self._label, self._slot + idx, self.crc, self.done - idx * BLOCK_BYTES)
        self.crc = 0

    def uses(self, connection: RangeConnection) -> None:
        with self._lock:
            self._connections.add(connection)
            if self.is_closed:
                connection.shut()

    def is_done_with(self, connection: RangeConnection) -> None:
        with self._lock:
            self._connections.discard(connection)

    def close(self) -> None:
        """No byte is written any more; readers that are still at it end."""
        with self._lock:
            if not self.is_closed:
                self.is_closed = True
                os.close(self._fd)
                for connection in self._connections:
                    connection.shut()


def read_run(
    run: BlockFetch,
    connections: Connections,
    target: PlainTarget,
    url: str,
    etag: str,
    run_start: int,
    stall_s: float,
    check: Callable[[Head], None] | None = None,
) -> float:
    """Reads what is missing of a run that begins at `run_start` of the object; the seconds to the first byte. Blocks its thread.

    `check`: a first look at the answer's head. Raises what it raises, OriginError, CapacityError, CorruptBlock, NotPlain.
    """
    first = run.done
    start, end = run_start + first, run_start + run.length
    request = request_bytes(target, etag, start, end)
    began_s = time.monotonic()
    try:
        connection, head = _ask(run, connections, target, request, stall_s)
    except OSError as error:
        raise transport_error(url, error, stall_s) from error
    is_reusable = False
    try:
        if check is not None:
            check(head)
        if head.status != 206:
            length = head.length if head.length is not None else MAX_ERROR_BODY_BYTES + 1
            body = connection.drain(min(length, MAX_ERROR_BODY_BYTES))
            is_reusable = len(body) == length and head.keeps_alive
            raise refusal(url, head, body, time.time())
        check_partial(url, etag, start, end, head)
        first_byte_s = time.monotonic() - began_s
        is_reusable = _read_body(run, connection, first, url, start, end, stall_s) and head.keeps_alive
        return first_byte_s
    finally:
        run.is_done_with(connection)
        if is_reusable:
            connections.give_back(connection)
        else:
            connection.close()


def _ask(
    run: BlockFetch, connections: Connections, target: PlainTarget, request: bytes, stall_s: float
) -> tuple[RangeConnection, Head]:
    """A kept connection that the other side has closed meanwhile is replaced; that is not the origin's failure."""
    while True:
        kept = connections.take(target)
        connection = kept or RangeConnection(target)
        run.uses(connection)
        try:
            return connection, connection.ask(request, stall_s)
        except BaseException as error:
            run.is_done_with(connection)
            connection.close()
            if kept is None or isinstance(error, TimeoutError) or not isinstance(error, OSError):
                raise


def _read_body(
    run: BlockFetch, connection: RangeConnection, first: int, url: str, start: int, end: int, stall_s: float
) -> bool:
    """True: the body was read to its end, so the connection can be used again.

    Bytes are written by whole blocks: what is written in the pieces in which a socket gives them lies in small pages of the page cache, and
    every later hit of it costs two to three times as much (benchmarks/pages.py). Nobody waits longer, since a block counts when it is
    whole."""
    buffer = _buffer()
    at, length = first, run.length
    while at < length:
        wanted = min(BLOCK_BYTES - at % BLOCK_BYTES, length - at)
        filled, failure = _fill(connection, buffer[:wanted])
        is_more = run.put(at, buffer[:filled])
        at += filled
        if not is_more:
            return at == length
        if failure is not None:
            if run.is_closed:
                return False
            raise transport_error(url, failure, stall_s) from failure
        if filled < wanted:
            if run.is_closed:
                return False
            raise failures.cut_short(url, start, end, at - first)
    return True


def _fill(connection: RangeConnection, buffer: memoryview) -> tuple[int, OSError | None]:
    """How much came: less than there is room for when the body ends, or breaks off with this failure."""
    filled = 0
    try:
        while filled < len(buffer) and (count := connection.read_into(buffer[filled:])):
            filled += count
    except OSError as error:
        return filled, error
    return filled, None


def _buffer() -> memoryview:
    """One per thread, used again for each piece of each block: memory does not grow with what is fetched."""
    buffer: memoryview | None = getattr(_own, "buffer", None)
    if buffer is None:
        buffer = _own.buffer = memoryview(bytearray(BUFFER_BYTES))
    return buffer
