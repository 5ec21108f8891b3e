"""The residency words: a table of 64-bit words in anonymous shared memory, written by the control process, read by everybody.

A memfd has no name, so a crash leaves nothing behind, and it is sparse: words that nobody uses cost nothing. Each store is one aligned
8-byte move, so a reader sees the old or the new word, never a mixture.
"""

from __future__ import annotations

import mmap
import os

WORD_BYTES = 8


class Words:
    """The writer's side. `fd` is what readers are given."""

    def __init__(self, num_words: int) -> None:
        self.num_words = num_words
        self.fd = os.memfd_create("railhead-words", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, num_words * WORD_BYTES)
        self._map = mmap.mmap(self.fd, num_words * WORD_BYTES)
        self._words = memoryview(self._map).cast("Q")

    def publish(self, word_idx: int, value: int) -> None:
        self._words[word_idx] = value

    def close(self) -> None:
        self._words.release()
        self._map.close()
        os.close(self.fd)


class WordsView:
    """A reader's side: `view[i]` costs some tens of nanoseconds. Takes ownership of `fd`."""

    def __init__(self, fd: int, num_words: int) -> None:
        try:
            self._map = mmap.mmap(fd, num_words * WORD_BYTES, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self.view = memoryview(self._map).cast("Q")

    def close(self) -> None:
        self.view.release()
        self._map.close()
