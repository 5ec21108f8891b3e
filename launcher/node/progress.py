"""The shared page of one rank: how far it is, in 4 KiB of memory that the rank writes and its agent reads. Standard library only.

Memory, not a file on disk: the kernel stalls a writer of a mapped file while it writes the page back, and a full disk would be a SIGBUS
in somebody's training. The agent makes an anonymous memory file and leaves a link to it in the rank's directory (`progress`); when the
agent is gone the memory is too, whoever was killed.

The page is 512 words of 64 bits. Words that say one thing each are stored by themselves. What belongs together (a step, when, how
long) is a record with its own number and a check sum, written in turn into one of two places: a reader takes the newer of those that are
whole, so it never sees half of an update, and a writer that is stopped in the middle of one has left the last one readable.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys

TYPE_CHECKING = False  # importing typing would cost a good part of our start
if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE_BYTES = 4096
VERSION = 1
"""Raised with every change of meaning of a word. Whoever finds another number leaves the page alone."""
_MAGIC = int.from_bytes(b"RHPAGE\0" + bytes([VERSION]), "little")

W_MAGIC, W_PID, W_BEGAN_NS, W_WAIT_SINCE_NS, W_PAUSED_SINCE_NS = 0, 1, 2, 3, 4
W_BATCHES, W_BATCH_AT_NS, W_TOTAL_STEPS, W_DONE_STEPS, W_NUM_PAUSES = 5, 6, 7, 8, 9
_SLOTS = (32, 64)
RECORD = struct.Struct("=8Q")
"""Number of the record, steps, when the last one ended, how long it took, time waited in data loaders so far, samples so far, time of its
own so far (from the end of a step to the next call of backward, where nobody waits for other ranks), check sum. Times in ns."""
_MASK = (1 << 64) - 1


def check_sum(number: int, steps: int, at_ns: int, took_ns: int, waited_ns: int, samples: int, own_ns: int) -> int:
    """Odd factors, so that a mixture of an old and a new record does not add up by chance."""
    return (number * 3 + steps * 5 + at_ns * 7 + took_ns * 11 + waited_ns * 13 + samples * 17 + own_ns * 19 + 1) & _MASK


def page_link(rank_directory: str) -> str:
    """Where the page of a rank is found."""
    return os.path.join(rank_directory, "progress")


class Page:
    """The page, mapped. `words` are its 64-bit words; a store to one is whole."""

    def __init__(self, fd: int, *, writable: bool) -> None:
        """Raises OSError or ValueError if this is no page of our version. The descriptor stays the caller's."""
        if os.fstat(fd).st_size < PAGE_BYTES:
            raise ValueError("not a progress page: too small")
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        # From Python 3.13 on the mapping needs no descriptor of its own.
        options = {"trackfd": False} if sys.version_info >= (3, 13) else {}
        self.memory = mmap.mmap(fd, PAGE_BYTES, mmap.MAP_SHARED, prot, **options)
        self.words = memoryview(self.memory).cast("Q")
        if self.words[W_MAGIC] != _MAGIC:
            raise ValueError("not a progress page of this version")

    def write_record(
        self, number: int, steps: int, at_ns: int, took_ns: int, waited_ns: int, samples: int, own_ns: int
    ) -> None:
        """One writer, whose `number` rises by 1."""
        check = check_sum(number, steps, at_ns, took_ns, waited_ns, samples, own_ns)
        offset = _SLOTS[number & 1] * 8
        RECORD.pack_into(self.memory, offset, number, steps, at_ns, took_ns, waited_ns, samples, own_ns, check)

    def read_record(self) -> Sequence[int] | None:
        """The newest whole record without its check sum; None before the first."""
        best: Sequence[int] | None = None
        for slot in _SLOTS:
            *values, check = RECORD.unpack_from(self.memory, slot * 8)
            if values[0] and check == check_sum(*values) and (best is None or values[0] > best[0]):
                best = values
        return best

    def close(self) -> None:
        self.words.release()
        self.memory.close()


def create() -> int:
    """A fresh page; its descriptor. Raises OSError."""
    fd = os.memfd_create("railhead-progress", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGE_BYTES)
    os.pwrite(fd, _MAGIC.to_bytes(8, "little"), 0)
    return fd


def open_page(rank_directory: str, *, writable: bool) -> Page:
    """Through the link in the rank's directory. Raises OSError (nobody keeps a page there any more) or ValueError (not one of ours)."""
    # What the link leads to may have become anything: never block on it, never let it become our terminal.
    flags = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | (os.O_RDWR if writable else os.O_RDONLY)
    fd = os.open(page_link(rank_directory), flags)
    try:
        return Page(fd, writable=writable)
    finally:
        os.close(fd)
