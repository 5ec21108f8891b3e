"""Bytes of a log file → pieces that can be shown. Pure.

A piece is whole lines where possible; `\\r` counts as a line's end, so that progress bars move. What has no end yet is held until
it gets one, becomes too long, or the caller says that the writer is quiet (a prompt); a UTF-8 character is never cut.
"""

from __future__ import annotations

MAX_HELD_BYTES = 64 * 1024
"""A line without an end is handed on in pieces of about this size: memory stays bounded, and nothing is lost."""


class LineAssembler:
    """One stream's unfinished line.

    >>> lines = LineAssembler()
    >>> lines.feed(b"one\\ntw"), lines.feed(b"o\\r"), lines.feed(b"three")
    (b'one\\n', b'', b'two\\r')
    >>> lines.flush()
    b'three'
    """

    def __init__(self, max_held_bytes: int = MAX_HELD_BYTES) -> None:
        self._held = b""
        self._max_held_bytes = max_held_bytes

    def feed(self, data: bytes) -> bytes:
        """All that can be shown now. A final `\\r` waits for its successor: with `\\n` it is one line end, not two."""
        data = self._held + data
        end = max(data.rfind(b"\n"), data.rfind(b"\r", 0, -1)) + 1
        if len(data) - end > self._max_held_bytes:
            end = _character_boundary(data)
        self._held = data[end:]
        return data[:end]

    def flush(self, *, at_end: bool = True) -> bytes:
        """What is held. `at_end` False: the writer is only quiet, so an unfinished character stays back."""
        end = len(self._held) if at_end else _character_boundary(self._held)
        shown, self._held = self._held[:end], self._held[end:]
        return shown


def _character_boundary(data: bytes) -> int:
    """Length of `data` without an incomplete UTF-8 character at its end (bytes that are no UTF-8 at all are complete).

    >>> _character_boundary("aé".encode()[:-1]), _character_boundary("aé".encode()), _character_boundary(b"\\xff")
    (1, 3, 1)
    """
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte & 0b1100_0000 == 0b1000_0000:
            continue  # a continuation byte: the lead is further left
        needed = 2 if byte >> 5 == 0b110 else 3 if byte >> 4 == 0b1110 else 4 if byte >> 3 == 0b11110 else 1
        return len(data) - back if needed > back else len(data)
    return len(data)
