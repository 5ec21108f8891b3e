"""The shared page of one rank: how far it is, in 4 KiB of memory that the rank writes and its agent reads. Standard library only.

Memory, not a file on disk: the kernel stalls a writer of a mapped file while it writes the page back, and a full disk would be a SIGBUS
in somebody's training. The agent makes an anonymous memory file and leaves a link to it in the rank's directory (`progress`); when the
agent is gone the memory is too, whoever was killed.

The page is 512 words of 64 bits, each stored by itself and whole: an integer, or, where a training step writes it (the *hot* words), a
float that counts or is a moment of CLOCK_MONOTONIC in seconds. There is no lock and no check sum. A step's words are stored in an order in
which half of them mislead nobody, the count last; and a reader looks twice, so a writer that runs meanwhile is noticed.
"""

from __future__ import annotations

import mmap
import os
import sys

TYPE_CHECKING = False  # importing typing would cost a good part of our start
if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE_BYTES = 4096
VERSION = 2
"""Raised with every change of meaning of a word. Whoever finds another number leaves the page alone."""
_MAGIC = int.from_bytes(b"RHPAGE\0" + bytes([VERSION]), "little")

W_MAGIC, W_PID, W_BEGAN_NS, W_PAUSED_SINCE_NS = 0, 1, 2, 3
W_TOTAL_STEPS, W_DONE_STEPS, W_NUM_PAUSES = 4, 5, 6

_HOT_AT = 64
"""Bytes: what a step writes is one line of the cache, and no other word is in it."""
NUM_HOT = 14
H_STEPS, H_STEP_AT_S, H_STEP_S, H_SAMPLES, H_OWN_S, H_WAIT_BEGAN_S, H_WAIT_ENDED_S, H_WAITED_S = range(8)
"""Steps; when the last one ended, and how long it took; samples of all steps; time so far of the rank's own (from the end of a step to the
next call of backward, where nobody waits for other ranks); when the main thread last began to wait for a data loader (0: there was nothing
more), and when it last had a batch; time waited so far, as of the last step."""
H_BATCHES, H_BATCH_AT_S = 8, 9
"""Batches, and when one came to another thread."""
H_TOLD_STEPS, H_TOLD_AT_S, H_TOLD_STEP_S, H_TOLD_SAMPLES = 10, 11, 12, 13
"""Where the script counts its steps itself (`watching.count_step`): then these are believed."""
_NUM_TRIES = 5


def page_link(rank_directory: str) -> str:
    """Where the page of a rank is found."""
    return os.path.join(rank_directory, "progress")


class Page:
    """The page, mapped. `words` are its integers, `hot` the floats that a step writes; a store to one is whole."""

    def __init__(self, fd: int, *, writable: bool) -> None:
        """Raises OSError or ValueError if this is no page of our version. The descriptor stays the caller's."""
        if os.fstat(fd).st_size < PAGE_BYTES:
            raise ValueError("not a progress page: too small")
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        # From Python 3.13 on the mapping needs no descriptor of its own.
        options = {"trackfd": False} if sys.version_info >= (3, 13) else {}
        self.memory = mmap.mmap(fd, PAGE_BYTES, mmap.MAP_SHARED, prot, **options)
        self.words = memoryview(self.memory).cast("Q")
        self.hot = memoryview(self.memory)[_HOT_AT : _HOT_AT + 8 * NUM_HOT].cast("d")
        if self.words[W_MAGIC] != _MAGIC:
            raise ValueError("not a progress page of this version")

    def read_hot(self) -> Sequence[float]:
        """The hot words as they were at one moment. (If the writer is so quick that they never stand still, the last look: its words
        are then some steps apart at most.)"""
        values = self.hot.tolist()
        for _ in range(_NUM_TRIES):
            before, values = values, self.hot.tolist()
            if values == before:
                break
        return values

    def close(self) -> None:
        self.words.release()
        self.hot.release()
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
