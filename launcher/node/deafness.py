"""Ranks that cannot hear a signal: their handler is Python's, and their main thread waits in a collective that nobody will finish.

Python runs a signal's handler in the main thread, between two of its own instructions. A rank that waits in C for a rank that is dead
never gets there, and spends the whole grace for nothing. That is known from outside when three things are true of it:

- it has a handler (without one the signal ends it);
- a moment later its main thread is in the very same wait as before the signal: same place in the machine code, same depth of the
  stack, and it was not woken but by the signal itself. No handler can have run, not even a short one that only sets a flag;
- its stack says that this is a collective, in which a rank is missing that has failed. Any other wait may end.

Whoever cannot be looked at so closely (a process that computes, a kernel that shows nothing) keeps its grace.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.gang.observations import RankStack
from launcher.gang.work import is_collective

PATIENCE_S = 1.0
_MAX_WAKES = 1
"""By the signal itself. (A collective that ends, and the next one in the same line of code, are at least one more.)"""


@dataclass(frozen=True)
class Wait:
    """Where a main thread waits in the kernel."""

    stack_pointer: str
    program_counter: str
    num_wakes: int
    """How often it has gone to sleep so far."""


def is_same_wait(before: Wait | None, now: Wait | None) -> bool:
    """Whether nothing but one signal has happened in between.

    >>> is_same_wait(Wait("7ff0", "41a0", 30), Wait("7ff0", "41a0", 31))
    True
    >>> is_same_wait(Wait("7ff0", "41a0", 30), Wait("7ff0", "41a0", 55)), is_same_wait(None, Wait("7ff0", "41a0", 31))
    (False, False)
    """
    if before is None or now is None:
        return False
    is_there = (before.stack_pointer, before.program_counter) == (now.stack_pointer, now.program_counter)
    return is_there and now.num_wakes - before.num_wakes <= _MAX_WAKES


def wait_of(pid: int) -> Wait | None:
    """Of the main thread; None while it runs, and where the kernel does not say."""
    try:
        with open(f"/proc/{pid}/task/{pid}/syscall") as file:
            words = file.read().split()
        if len(words) < 3:  # `running`
            return None
        num_wakes = _status(pid, "voluntary_ctxt_switches:")
    except (OSError, ValueError):
        return None
    return Wait(words[-2], words[-1], int(num_wakes))


def catches(pid: int, signum: int) -> bool:
    """Whether it has a handler of its own for this signal."""
    try:
        return bool(int(_status(pid, "SigCgt:"), 16) >> (signum - 1) & 1)
    except (OSError, ValueError):
        return False


def _status(pid: int, name: str) -> str:
    """Of the main thread. Raises OSError or ValueError."""
    with open(f"/proc/{pid}/task/{pid}/status") as file:
        for line in file:
            if line.startswith(name):
                return line.split()[1]
    raise ValueError(name)


class Hearing:
    """Of the ranks of one node that are told to stop because another has failed. To be made before they are sent the signal."""

    def __init__(self, pids: Mapping[int, int], signum: int) -> None:
        """pids: process of each rank."""
        self._pids = {rank: pid for rank, pid in pids.items() if catches(pid, signum)}
        self._waits = {rank: wait_of(pid) for rank, pid in self._pids.items()}
        self.due_s: float | None = time.monotonic() + PATIENCE_S
        """When `suspects` is to be asked; None: no more."""

    def suspects(self) -> dict[int, int]:
        """Ranks, with their processes, that nothing has happened to. Their stacks are wanted."""
        self.due_s = None
        waits = {rank: wait_of(pid) for rank, pid in self._pids.items()}
        self._waits = {rank: now for rank, now in waits.items() if is_same_wait(self._waits[rank], now)}
        return {rank: self._pids[rank] for rank in self._waits}

    def deaf(self, stacks: Sequence[RankStack]) -> list[int]:
        """Those of them that will not hear. (Looking at a stack may have taken a signal, too.)"""
        return [
            stack.rank
            for stack in stacks
            if stack.rank in self._waits
            and is_collective(stack.frames)
            and is_same_wait(self._waits[stack.rank], wait_of(self._pids[stack.rank]))
        ]
