"""One line at the bottom of a terminal, below whatever is printed there, as sequences of bytes. Pure.

Two places. If what was printed last has ended its line, ours stands in the next one, with the cursor left at its beginning: whatever comes
next is written over it. If it has not (a progress bar), ours stands one row below, and the cursor goes back to where it was. In
both, everything from the beginning of our line to the end of the screen is ours: when a terminal becomes narrower and folds the line into
two rows, both are cleared.

Sequences that all terminals know: DECSC and DECRC (ESC 7, ESC 8), IND (ESC D: one row down in the same column, scrolling at the bottom),
CUU and CUD (up, down), ED (clear to the end of the screen), SGR 2 (faint). No alternate screen, no scrolling region, nothing to undo if
we are killed.
"""

from __future__ import annotations

MIN_COLUMNS = 12
_MIN_ROWS = 3
_SEPARATOR = " · "


def fit(parts: list[str], columns: int) -> str:
    """As many of the parts as fit, the first ones first, one column left free: a terminal folds, or scrolls, on the last one.

    >>> fit(["step 12 of 40", "31 samples/s"], 80), fit(["step 12 of 40", "31 samples/s"], 20), fit(["step 12 of 40"], 12)
    ('step 12 of 40 · 31 samples/s', 'step 12 of 40', 'step 12 of…')
    """
    room = columns - 1
    if columns < MIN_COLUMNS or not parts:
        return ""
    for num in range(len(parts), 0, -1):
        line = _SEPARATOR.join(parts[:num])
        if len(line) <= room:
            return line
    return f"{parts[0][: room - 1]}…"


def show(line: str, *, is_open: bool, is_coloured: bool) -> bytes:
    """Puts the line there; what stood there before must have been hidden. is_open: what was printed last has not ended its line."""
    words = (f"\x1b[2m{line}\x1b[22m" if is_coloured else line).encode()
    # The row below must be there before the cursor's place is kept: making it may scroll.
    return b"\x1bD\x1b[A\x1b7\x1b[B\r" + words + b"\x1b8" if is_open else b"\r" + words + b"\r"


def hide(*, is_open: bool) -> bytes:
    """Takes it away again."""
    return b"\x1b7\x1b[B\r\x1b[J\x1b8" if is_open else b"\r\x1b[J"


def has_room(columns: int, rows: int) -> bool:
    return columns >= MIN_COLUMNS and rows >= _MIN_ROWS
